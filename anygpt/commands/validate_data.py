"""Validate a data file ahead of a run: reports every fault with file, line and sample, and a summary.

    anygpt validate-data train.jsonl --media-root media --deep --num-workers 8
    anygpt validate-data train.jsonl --processor runs/stage2/final --max-tokens 2048
    anygpt validate-data 'shards/{00000..00012}.tar' --task generation
    anygpt validate-data table.parquet --columns image=picture text=caption --task comprehension

Faults are printed to stdout, one per line. The exit code is 1 if there are any, 2 for an invalid file or argument.
"""

import sys

from tqdm import tqdm

from anygpt.commands import check_range, new_parser
from anygpt.data.formats.base import DataSource
from anygpt.data.formats.dialects import TASKS
from anygpt.data.formats.reading import FORMATS
from anygpt.data.lengths import Lengths
from anygpt.data.validation import validate
from anygpt.processing.processor import MultimodalProcessor


def main(arguments: list[str]) -> int:
    parser = new_parser("validate-data", __doc__)
    add = parser.add_argument
    add("file", help="the data file; for shards and tables also a glob or braces")
    add("--format", help=f"{', '.join(FORMATS)} (default: by the suffix)")
    add("--media-root", help="the folder that media paths are relative to (default: that of the file)")
    add(
        "--columns",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=COLUMN",
        help="columns of a table: image=…, text=… and so on",
    )
    add("--task", choices=TASKS, help="what is learned from pairs of media and captions")
    add("--follow-links", action="store_true", help="links below the media root may lead out of it")
    add("--deep", action="store_true", help="decode every medium; with --processor, prepare every row")
    add("--processor", metavar="DIR", help="a run's final/ or checkpoint folder, to count tokens")
    add("--max-tokens", type=int, help="maximum tokens of a row, media included; more is a fault")
    add("--num-workers", type=int, default=0, help="processes that decode and count (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.max_tokens is not None and args.processor is None:
        parser.error("--max-tokens needs --processor, which knows the tokenizer and the encoders")
    check_range(args, 0, float("inf"), "num_workers")
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    lengths = None if args.processor is None else Lengths(MultimodalProcessor.from_pretrained(args.processor))
    columns = dict(pair.partition("=")[::2] for pair in args.columns)
    if len(columns) < len(args.columns) or not all(columns.values()):
        parser.error("--columns takes pairs KEY=COLUMN, and each key once")
    more = {"columns": columns or None, "task": args.task, "follow_links": args.follow_links}
    report = validate(
        DataSource(args.file, args.format, args.media_root, **more),
        deep=args.deep,
        lengths=lengths,
        max_tokens=args.max_tokens,
        num_workers=args.num_workers,
        on_fault=lambda fault: tqdm.write(str(fault)),
        progress=lambda rows: tqdm(rows, unit=" rows", disable=None),
    )
    rows = [("rows", report.rows), ("samples without a fault", report.samples)]
    rows += [(f"media: {what}", count) for what, count in sorted(report.media.items())]
    if report.tokens:
        rows += [("tokens of all samples", report.tokens), ("tokens of the longest", report.longest)]
    for what, count in (("repeated conversations", report.repeated), ("repeated ids", report.repeated_ids)):
        rows += [(what, count)] if count else []
    rows += [(f"faults: {kind}", count) for kind, count in sorted(report.faults.items())] or [("faults", 0)]
    width = max(len(what) for what, _ in rows)
    print("\n".join(f"{what:<{width}}  {count:>10,}" for what, count in rows))
    return 1 if report.faults else 0
