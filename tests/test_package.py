"""What is shipped: the source distribution is the repository, the wheel is the package, and it runs where no repository is.

Built without network, isolation and compiler: what the compiled library may need is asked of the one that is installed here.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import mmcompress

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "csrc", "mmcompress", "model_cards", "tests")
FILES = ("LICENSE", "Makefile", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt")
FILES += ("pyproject.toml", "setup.py", ".clang-format", ".gitignore", ".pre-commit-config.yaml")
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "-q")


def python(*arguments, cwd, **environment):
    """Run this interpreter; returns what it printed, and raises with what it complained of."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(source, folder):
    """The wheel of a tree or a source distribution, without the compiled operators."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", "-w", folder)
    python(*PIP, "wheel", *options, source, cwd=folder.parent, MMCOMPRESS_BUILD="0", SOURCE_DATE_EPOCH="315532800")
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel):
    with zipfile.ZipFile(wheel) as z:
        return {name: z.read(name) for name in z.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the repository with what no build may take in, its source distribution, and the wheels of both."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    tree.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", ".hypothesis"))
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    files = {str(PurePosixPath(p.relative_to(tree))) for p in tree.rglob("*") if p.is_file()}
    (tree / "mmcompress" / "_C.abi3.so").write_bytes(b"an old build")
    (tree / "mmcompress" / "__pycache__").mkdir()
    (tree / "mmcompress" / "__pycache__" / "cli.cpython-311.pyc").write_bytes(b"an old cache")
    for name in ("build", "dist", "runs", "demo"):
        (tree / name).mkdir()
        (tree / name / "left.txt").write_text("left over")
    make = "import setuptools.build_meta as b; b.build_sdist('../sdist')"
    python("-c", make, cwd=tree, MMCOMPRESS_BUILD="0")
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    return files, sdist, wheel_of(tree, folder / "of_tree"), wheel_of(sdist, folder / "of_sdist")


def test_the_source_distribution_is_the_repository(built):
    files, sdist, _, _ = built
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames() if tar.getmember(name).isfile()}
    made = {name for name in inside if name in ("PKG-INFO", "setup.cfg") or name.startswith("mmcompress.egg-info/")}
    assert files - inside == set() and inside - files - made == set()
    assert any(name.endswith(".cuh") for name in inside) and "tests/test_package.py" in inside


def test_the_wheel_is_the_package_and_nothing_else(built):
    files, _, wheel, _ = built
    inside = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert inside == {name for name in files if name.startswith("mmcompress/")}
    data = (
        "eval/presets/pillars.json",
        "py.typed",
        "page.css",
        "zoo/parts/image/card.json",
        "zoo/parts/image/lora.safetensors",
    )
    assert {f"mmcompress/{name}" for name in data} <= inside


def test_wheels_of_tree_and_source_distribution_are_equal(built):
    _, _, of_tree, of_sdist = built
    assert of_tree.name == of_sdist.name and of_tree.read_bytes() == of_sdist.read_bytes()


def test_version_is_said_once(built):
    *_, wheel = built
    assert wheel.name.split("-")[1] == mmcompress.__version__


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel, installed in a folder of its own, and an empty folder to work in."""
    target, place = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    python(*PIP, "install", "--no-deps", "--no-index", "--no-compile", "--target", target, built[3], cwd=place)
    return target, place


def run(installed, *arguments):
    target, place = installed
    return python(*arguments, cwd=place, PYTHONPATH=str(target), PYTHONDONTWRITEBYTECODE="1").strip()


def test_imports_without_a_warning(installed):
    where = run(installed, "-W", "error", "-c", "import mmcompress; print(mmcompress.__file__)")
    assert Path(where).is_relative_to(installed[0])


def test_presets_come_along(installed):
    """Their results belong to whoever runs them, not to the folder of installed packages."""
    code = """if True:
        import json
        from mmcompress.eval import bench
        plans = {path.stem: bench.load_preset(path.stem) for path in bench.PRESETS.glob("*.json")}
        print(json.dumps({name: [str(plan.stem), len(plan.sweeps)] for name, plan in plans.items()}))"""
    plans = json.loads(run(installed, "-c", code))
    assert set(plans) == {path.stem for path in (ROOT / "mmcompress" / "eval" / "presets").iterdir()} and "pillars" in plans
    assert all(stem == f"runs/bench/{name}" and sweeps for name, (stem, sweeps) in plans.items())


def test_the_command_is_installed(installed):
    assert run(installed, installed[0] / "bin" / "mmcompress", "--version") == f"mmcompress {mmcompress.__version__}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_compiled_library_needs_torch_and_the_system_alone():
    """What an index takes as manylinux, apart from torch's own libraries, which a wheel must not bring a second time."""
    elffile = pytest.importorskip("elftools.elf.elffile", reason="comes with auditwheel, in the extra dev")
    libraries = list(Path(mmcompress.__file__).parent.glob("_C.abi3.so"))
    if not libraries:
        pytest.skip("the CPU operators are not built here")
    with open(libraries[0], "rb") as file:
        elf = elffile.ELFFile(file)
        dynamic = elf.get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}
        searched = [tag for tag in dynamic.iter_tags() if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert needed - system <= {"libc10.so", "libtorch.so", "libtorch_cpu.so"} and not searched
