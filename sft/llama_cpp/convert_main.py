"""Run llama.cpp's converter: `python convert_main.py SOURCE PRE_TOKENIZER ARGUMENTS...`.

The converter knows pre-tokenizers by a digest of the tokens of one text, which depends on the vocabulary. Where it does
not know the digest, PRE_TOKENIZER (unless empty) is the name for the way in which the tokenizer splits text. No
Python file of the checkpoint runs. A separate program, as the converter needs its own version of the package gguf.
"""

from __future__ import annotations

import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> None:
    """Run the converter with `argv[2:]`."""
    source, pre_tokenizer = Path(argv[0]), argv[1]
    script = source / "convert_hf_to_gguf.py"
    # packages that this environment lacks, such as sentencepiece, are those of llama.cpp's environment
    others = sysconfig.get_path("purelib", vars={"base": str(source.parent)})
    sys.path[:] = [str(source), str(source / "gguf-py"), *sys.path, others]
    from conversion import base
    from transformers import AutoTokenizer

    recognize = base.TextModel.get_vocab_base_pre
    load = AutoTokenizer.from_pretrained

    def recognize_or_given(self: Any, tokenizer: Any) -> Any:
        try:
            return recognize(self, tokenizer)
        except NotImplementedError:
            if not pre_tokenizer:
                raise
            return pre_tokenizer

    def load_without_code(*args: Any, **options: Any) -> Any:
        return load(*args, **{**options, "trust_remote_code": False})

    base.TextModel.get_vocab_base_pre = recognize_or_given
    AutoTokenizer.from_pretrained = load_without_code
    sys.argv = [str(script), *argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
