"""How fast weights are packed and unpacked, in million weights a second; docs/formats.md quotes these figures."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from moert.cli.packing import ALL, packing_format
from timing import interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of packing and of unpacking each format")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--smoke", action="store_true", help="one call of each, of a small matrix")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    w = torch.randn((16, 256) if options.smoke else (2048, 4096))
    how = {"seconds": 0.0, "rounds": 1} if options.smoke else {"seconds": options.seconds}
    rows, columns = w.shape
    title = f"million weights a second, {rows} x {columns}, {torch.get_num_threads()} threads, best"
    table = Table("format", "pack", "unpack", title=title)
    for name in ("int8:32", *ALL):
        fmt = packing_format(name)
        packed = fmt.pack(w)
        ways = {"pack": lambda fmt=fmt: fmt.pack(w), "unpack": lambda fmt=fmt, packed=packed: fmt.unpack(packed)}
        times = interleaved(ways, **how)
        table.add_row(name, *(f"{1e-6 * w.numel() / min(times[way]):.0f}" for way in ways))
    Console().print(table)


if __name__ == "__main__":
    main()
