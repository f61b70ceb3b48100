"""Adapters to inference runtimes: one file each, and one line in BUILT_IN.

Nothing here imports a runtime: `find_target` of dotexport/exports/target.py imports the one file
whose name is asked for. A runtime that is not installed with dotexport itself comes with the extra
that has the target's name.
"""

if __name__ == "targets":
    raise ImportError("import it as dotexport.targets: a bare `targets` would clash with others")

BUILT_IN = {
    "hf": "dotexport.targets.hf:HuggingFace",
    "ort-cpu": "dotexport.targets.ort:OrtCpu",
    "ort-cuda": "dotexport.targets.ort:OrtCuda",
    "onnx": "dotexport.targets.portable:Portable",
    "openvino": "dotexport.targets.intel:OpenVino",
    "gguf": "dotexport.targets.ggml:Gguf",
    "executorch": "dotexport.targets.phone:ExecuTorch",
    "mlx": "dotexport.targets.apple:Mlx",
    "litert": "dotexport.targets.edge:LiteRt",
}

# Runtimes that read what another target writes: a plan may name them, nothing is written for them.
READERS = {"vllm": "dotexport.targets.vllm_tokens:Vllm"}
