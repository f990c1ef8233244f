"""Do the public models reach their published numbers? This needs the data, and a GPU.

    python tests/published.py --coco /data/coco --humanart /data/HumanArt

It prints a line for each AP in published.csv, which has mmpose's tables of ViTPose: what is
published, what is measured here, and whether they agree within 0.002. What is measured is kept in
the folder of --out, so that a command that was stopped goes on. Remove the folder after a change of
code or data. The exit status is 1 if a number differs. With --dry-run it prints the command of each
number, and measures nothing.

The detected boxes are mmpose's: COCO_val2017_detections_AP_H_56_person.json, and in Human-Art's
download HumanArt_validation_detections_AP_H_56_person.json. They lie in the data set's folder, or
there in annotations/ or person_detection_results/.
"""
import argparse
import csv
import io
import json
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import eval  # noqa: E402
from data import DataError, write_json  # noqa: E402

TOLERANCE = 0.002
BOXES = {"coco": "COCO_val2017_detections_AP_H_56_person.json",
         "humanart": "HumanArt_validation_detections_AP_H_56_person.json"}
BOX_FOLDERS = ("", "annotations", "person_detection_results")


def read_table():
    with open(HERE / "published.csv", newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def box_file(data, root):
    """The file with a detector's boxes. Raises DataError if it is not there."""
    for folder in BOX_FOLDERS:
        path = Path(root) / folder / BOXES[data]
        if path.is_file():
            return path
    raise DataError(f"{root}: expected {BOXES[data]} for the numbers in detected boxes")


def words_of(row, root):
    """The options of eval.py for a row of the table."""
    words = ["--checkpoint", row["model"], "--data", f"{row['data']}:{root}", "--json"]
    if row["boxes"] == "detected":
        words += ["--boxes", str(box_file(row["data"], root))]
    return words


def measured(row, root, out):
    """The AP of a row of the table, as eval.py prints it; it is measured once, and then kept."""
    kept = Path(out) / f"{row['model']}-{row['data']}-{row['boxes']}.json"
    if not kept.exists():
        with redirect_stdout(io.StringIO()) as printed:
            status = eval.main(words_of(row, root))
        if status:
            sys.exit(status)
        write_json(kept, json.loads(printed.getvalue()))
    return json.loads(kept.read_text("utf-8"))["AP"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coco", metavar="ROOT", help="COCO's folder")
    parser.add_argument("--humanart", metavar="ROOT", help="Human-Art's folder")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--out", default="published", help="the folder of what is measured")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    options = parser.parse_args(argv)
    rows = [row for row in read_table() if getattr(options, row["data"])]
    if options.models:
        rows = [row for row in rows if row["model"] in options.models]
    if not rows:
        parser.error("expected --coco or --humanart, and in --models names of published.csv")
    try:
        if options.dry_run:
            print_commands(rows, options)
            return 0
        return compare(rows, options)
    except DataError as error:
        parser.error(str(error))


def print_commands(rows, options):
    for row in rows:
        words = words_of(row, getattr(options, row["data"]))
        print(f"python eval.py {shlex.join(words)}  # published {row['AP']}")


def compare(rows, options):
    """Prints each number beside the published one. Returns 1 if one differs, otherwise 0."""
    differ = 0
    for row in rows:
        published = float(row["AP"])
        found = measured(row, getattr(options, row["data"]), options.out)
        agrees = abs(found - published) <= TOLERANCE + 1e-9  # a difference of 0.002 has an error
        differ += not agrees
        print(f"{row['model']:18} {row['data']:8} {row['boxes']:8} boxes  published {published:.3f}"
              f"  here {found:.3f}  {'agrees' if agrees else 'DIFFERS'}", flush=True)
    print(f"{len(rows) - differ} of {len(rows)} numbers agree within {TOLERANCE}")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
