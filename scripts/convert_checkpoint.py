"""Converts trained ISANets between mmsegmentation, openseg.pytorch and this project.

    python scripts/convert_checkpoint.py mmseg SOURCE.pth TARGET.ckpt
    python scripts/convert_checkpoint.py openseg SOURCE.pth TARGET.ckpt --data-set cityscapes
    python scripts/convert_checkpoint.py isanet-pl SOURCE.ckpt TARGET.pth --to mmseg

The target has all that makes the logits of its network equal to the source's. What mmsegmentation
has no place for (scales, flip, padding of windows) is named. Nothing in the source is executed.
"""

import argparse
import sys
from pathlib import Path

from isanet_pl import convert
from isanet_pl.messages import configure_messages

READERS = {"mmseg": convert.read_mmseg, "openseg": convert.read_openseg}
WRITERS = {"isanet-pl": convert.write_checkpoint, "mmseg": convert.write_mmseg}


def parse_arguments() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layout", choices=[*READERS, "isanet-pl"], help="whose file SOURCE is")
    parser.add_argument("source", type=Path, help="file to read")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--to", choices=WRITERS, default="isanet-pl", help="whose file TARGET is")
    parser.add_argument(
        "--data-set",
        choices=convert.DATA_SETS,
        metavar="NAME",
        help="names and colours of the classes, if not as the file says: "
        + ", ".join(convert.DATA_SETS),
    )
    parser.add_argument(
        "--align-corners",
        choices=["true", "false"],
        help="of the upsampling, if not as the file says",
    )
    args = parser.parse_args()
    if args.layout == "isanet-pl" and (args.data_set or args.align_corners):
        parser.error("--data-set and --align-corners are for files that do not say so themselves")
    return args


def main() -> None:
    """Converts one file and says what it is."""
    args = parse_arguments()
    configure_messages()
    corners = None if args.align_corners is None else args.align_corners == "true"
    try:
        if args.source.resolve() == args.target.resolve():
            raise ValueError(f"{args.target} would overwrite the source")
        if args.layout == "isanet-pl":
            trained = convert.read_trained(args.source)
        else:
            trained = READERS[args.layout](args.source, args.data_set, corners)
        args.target.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[args.to](trained, args.target)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_checkpoint.py: error: {error}")
    about = trained.network.arguments
    print(
        f"{args.target}: {about['backbone']}, {about['num_classes']} classes "
        f"({trained.classes.data_set or ', '.join(trained.classes.names)}), align_corners "
        f"{about['align_corners']}, {trained.network.inference.mode} images, {trained.steps} steps"
    )


if __name__ == "__main__":
    main()
