"""Write a GGUF file in another kind by libllama: `python quantize_main.py JOB.json`, in llama.cpp's environment.

A separate program, so that an error of the library does not end the pipeline. The job names the library's folder, the
input, the output, the kind, the number of threads, and a file with the importance of each column of each tensor as
NumPy arrays, or null.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

KINDS = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq2_xxs": 19,
    "iq2_xs": 20,
    "iq3_xs": 22,
    "iq3_xxs": 23,
    "iq4_nl": 25,
    "iq3_s": 26,
    "iq3_m": 27,
    "iq2_s": 28,
    "iq2_m": 29,
    "iq4_xs": 30,
    "bf16": 32,
}
"""Kind -> its number in `enum llama_ftype` of llama.h."""


class Importance(ctypes.Structure):
    """`struct llama_model_imatrix_data` of llama.h: the importance of a tensor's columns; a list ends with no name."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Params(ctypes.Structure):
    """`struct llama_model_quantize_params` of llama.h, with room for what later versions append."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 16),
    )


def main(job_file: str) -> int:
    """Carry out a job; return the exit code."""
    import numpy

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    (file,) = Path(job["library"]).glob("libllama.*so")
    library = ctypes.CDLL(str(file))
    library.llama_model_quantize_default_params.restype = Params
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params))
    library.llama_backend_init()
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = KINDS[job["kind"]], job["threads"]
    if job["importance"] is not None:
        stored = numpy.load(job["importance"])
        arrays = {name: numpy.ascontiguousarray(stored[name], dtype=numpy.float32) for name in stored.files}
        entries = (Importance * (len(arrays) + 1))()
        for entry, (name, values) in zip(entries, arrays.items(), strict=False):
            entry.name, entry.data, entry.size = name.encode(), values.ctypes.data, values.size
        params.imatrix = ctypes.cast(entries, ctypes.c_void_p)
    return int(library.llama_model_quantize(job["input"].encode(), job["output"].encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
