"""docs/systems.md from the result files: `python page.py` takes over what build/systems holds, then writes the page.

Claims, notes and titles are those that the experiments have now; figures, and in what the variants were equal, are
those of their runs.
"""

import importlib.util
import json
import sys
from collections.abc import Collection
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiment.declare import Claim, Experiment
from experiment.report import measured
from experiment.run import BUILD, ROOT, said
from moert.cli.report import write_json

RESULTS = ROOT / "bench" / "results" / "systems"
PAGE = ROOT / "docs" / "systems.md"
HEAD = """# Systems

What the MoE literature builds, each a change to one part of the mechanism: a router, experts, or a layer around them.
`make systems` runs the experiments of `examples/systems`, each under two minutes on two cores, and writes this page
from their results (`bench/results/systems`); `make systems ARGS="mor promoe"` runs some of them. Each row names the
command and the commit that gave its figures, which are mean ± standard deviation over the seeds, and the seconds that
they took. "shown" means that the claim holds in every seed, not only in the mean; "in the mean only" is followed by the
95 % interval of the mean difference over the seeds (Student's t), whose lower end is above 0 where chance alone does
not explain it. The experiments are small: they say whether an effect shows at this size. What was tried where one did
not show, on other seeds than the table's, is under Notes.

| system | paper | class | claimed effect | measured | where it was run |
| --- | --- | --- | --- | --- | --- |
"""


def page(results: list[dict]) -> str:
    """The table, a row per claim, then what is to be said about each system."""
    rows = [row for result in results for row in rows_of(result)]
    notes = [f"- **{result['title']}**: {result['notes']}\n" for result in results if result["notes"]]
    return HEAD + "".join(rows) + ("\n## Notes\n\n" + "".join(notes) if notes else "")


def rows_of(result: dict) -> list[str]:
    name, machine = result["name"], result["machine"]
    page = ROOT / "docs" / "systems" / f"{name}.md"
    title = f"[{result['title']}](systems/{name}.md)" if page.exists() else result["title"]
    paper = f"[{result['paper']}](https://arxiv.org/abs/{result['paper'].removeprefix('arXiv:')})"
    classes = ", ".join(f"`{each}`" for each in result["classes"])
    where = f"{machine['processor']}, commit {result['commit']}, {result['date']}; `{result['command']}`, "
    where += f"{len(result['seeds'])} seeds"
    if "wall_seconds" in result:
        where += f", {result['wall_seconds']:.0f} s"
    if "cpu_seconds" in result:  # a time on the wall is as long as other programs make it
        where += f", {sum(map(sum, result['cpu_seconds'].values())):.0f} s of a core"
    where += f"; {result['equal']}"
    claims = [Claim(**claim) for claim in result["claims"]]
    return [f"| {title} | {paper} | {classes} | {c.words} | {measured(c, result)} | {where} |\n" for c in claims]


def experiments(but: Collection[str] = ()) -> dict[str, Experiment]:
    """Every system's, by name, but those of the files with these stems."""
    found = {}
    for path in sorted((ROOT / "examples" / "systems").glob("*.py")):
        if path.stem in but:
            continue
        spec = importlib.util.spec_from_file_location(f"system_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[module.EXPERIMENT.name] = module.EXPERIMENT
    return found


def results() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def main(but: Collection[str] = ()) -> None:
    """but: stems of files that may not even load, whose results stay as they are."""
    for path in sorted(BUILD.glob("*.json")):
        write_json(RESULTS / path.name, json.loads(path.read_text()))
    for name, experiment in experiments(but).items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            old = json.loads(path.read_text())
            write_json(path, old | said(experiment) | {"equal": old["equal"]})
    PAGE.write_text(page(results()))


if __name__ == "__main__":
    main()
