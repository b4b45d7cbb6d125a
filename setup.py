"""The two optional extensions. MMCOMPRESS_BUILD = auto (default) | 0 | cpu | cuda; only `auto` tolerates a failed build.

For tests: MMCOMPRESS_SANITIZE=1 builds the CPU kernels with the address and undefined-behaviour sanitizers, and
MMCOMPRESS_EMULATE_AVX512=1 with the AVX-512 code emulated on AVX2.
"""

import os
from pathlib import Path

from setuptools import setup


def cuda_home():  # torch guesses dirname(dirname(which nvcc)), which may hold no libcudart
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").is_file() and any(Path(home).glob("lib*/libcudart.so*")):
            return home
    return None


build, home, kwargs = os.environ.get("MMCOMPRESS_BUILD", "auto"), cuda_home(), {}
if build not in ("auto", "0", "cpu", "cuda"):
    raise SystemExit(f"MMCOMPRESS_BUILD must be auto, 0, cpu or cuda, got {build!r}")
if build == "cuda" and not home:
    raise SystemExit("MMCOMPRESS_BUILD=cuda needs a CUDA toolkit: set CUDA_HOME to where bin/nvcc and lib64/libcudart.so are")
if build != "0":
    os.environ.pop("CUDA_HOME", None)
    if home:
        os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension is imported
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # where the tree and torch lie is nobody's business, and would make two builds differ; -g0 takes back Python's own -g
    portable = ["-g0", *(f"-ffile-prefix-map={folder}/=" for folder in (Path.cwd(), Path(torch.__file__).parent))]
    stable = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    cxx = [*stable, *portable, "-ffp-contract=off", "-fvisibility=hidden"]  # the same rounding wherever it is compiled
    link = []
    if os.environ.get("MMCOMPRESS_SANITIZE") == "1":
        sanitize = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
        cxx, link = [*cxx, *sanitize], sanitize
    if os.environ.get("MMCOMPRESS_EMULATE_AVX512") == "1":
        cxx.append("-DMMCOMPRESS_EMULATE_AVX512")

    def sources(*patterns):
        return ["csrc/module.cpp", *sorted(str(p) for pattern in patterns for p in Path("csrc").glob(pattern))]

    def headers(folder):
        return sorted(str(p) for pattern in ("*.h", f"{folder}/*.h", f"{folder}/*.cuh") for p in Path("csrc").glob(pattern))

    extensions = [
        CppExtension(
            "mmcompress._C",
            sources("cpu/*.cpp"),
            depends=headers("cpu"),
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
            py_limited_api=True,
        )
    ]
    if build == "cuda" or (build == "auto" and home and torch.version.cuda):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
        extensions.append(
            CUDAExtension(
                "mmcompress._C_cuda",
                sources("cuda/*.cpp", "cuda/*.cu"),
                depends=headers("cuda"),
                py_limited_api=True,
                extra_compile_args={"cxx": [*stable, *portable], "nvcc": [*stable, "-DUSE_CUDA"]},
            )
        )

    class Build(BuildExtension):
        def build_extension(self, extension):  # Extension.optional does not catch ninja's RuntimeError
            try:
                super().build_extension(extension)
            except Exception as error:
                if build != "auto":
                    raise
                print(f"warning: {extension.name} not built ({error}); its operators run their PyTorch reference")

        def copy_extensions_to_source(self):  # the in-place copy must skip what was not built
            built = Path(self.build_lib)
            name = {e.name: self.get_ext_filename(self.get_ext_fullname(e.name)) for e in self.extensions}
            self.extensions = [e for e in self.extensions if (built / name[e.name]).exists()]
            super().copy_extensions_to_source()

    kwargs = {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
setup(**kwargs)
