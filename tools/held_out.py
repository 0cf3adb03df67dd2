"""Write the stories that the bundled models never saw, for `qwen-ref score`.

    python tools/held_out.py tinystories-dedup.txt held_out.txt
    qwen-ref score tiny --text held_out.txt --dtype float32 --formats int8,int4,int4:gptq,nf4,fp8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tiny_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path, help="the text that train_tiny.py was given as --stories")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    _, held_out = tiny_data.split_held_out(tiny_data.clean_stories(arguments.stories.read_text(encoding="utf-8")))
    arguments.out.write_text("".join(f"{story}<|endoftext|>" for story in held_out), encoding="utf-8")


if __name__ == "__main__":
    main()
