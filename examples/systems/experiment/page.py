"""docs/systems.md from the result files: `python page.py` takes over what build/systems holds, then writes the page."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiment.declare import Claim
from experiment.report import measured
from experiment.run import BUILD, ROOT
from moert.cli.report import write_json

RESULTS = ROOT / "bench" / "results" / "systems"
PAGE = ROOT / "docs" / "systems.md"
HEAD = """# Systems

What the MoE literature builds, each a change to one part of the mechanism: a router, experts, or a layer around them.
`make systems` runs the experiments of `examples/systems` and writes this page from their results
(`bench/results/systems`); figures are mean ± standard deviation over the seeds. "shown" means that the claim holds in
every seed, not only in the mean; "in the mean only" is followed by the 95 % interval of the mean difference over the
seeds (Student's t), whose lower end is above 0 where chance alone does not explain it. The experiments are small: they
say whether an effect shows at this size.

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
    where = f"{machine['processor']}, {machine['threads']} threads, commit {result['commit']}, {result['date']}"
    where = f"{where}, {len(result['seeds'])} seeds, {result['equal']}"
    if "cpu_seconds" in result:  # results from before it was counted have a time that neighbours lengthened
        where = f"{where}; {sum(map(sum, result['cpu_seconds'].values())):.0f} s of a core"
    claims = [Claim(**claim) for claim in result["claims"]]
    return [f"| {title} | {paper} | {classes} | {c.words} | {measured(c, result)} | {where} |\n" for c in claims]


def results() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def main() -> None:
    for path in sorted(BUILD.glob("*.json")):
        write_json(RESULTS / path.name, json.loads(path.read_text()))
    PAGE.write_text(page(results()))


if __name__ == "__main__":
    main()
