"""The command line: `mmcompress demo | run | inspect | bench | methods | models | check | doctor`.

Results go to stdout, progress and errors to stderr. Bad input is one sentence and exit code 2; anything else that goes wrong
keeps its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmcompress.io import named
from mmcompress.registry import create, did_you_mean

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> Any:
        raise ValueError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a letter, a file name that is no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    as_json = "--json" in arguments
    try:
        args = parser().parse_args(_command(arguments))
        return args.command(args) or 0
    except BrokenPipeError:  # the reader of a pipe had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        if "--traceback" in arguments:
            raise
        return _fail(sentence(error), as_json, 2)
    except Exception as error:
        if not as_json:
            raise
        return _fail(f"{type(error).__name__}: {sentence(error)}", as_json, 1)


def _fail(message: str, as_json: bool, code: int) -> int:
    if as_json:
        print(json.dumps({"error": message}))
    print(f"mmcompress: {message}", file=sys.stderr)
    return code


def sentence(error: BaseException) -> str:
    """An error's message in one line; of a long message of another library the first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _command(arguments: list[str]) -> list[str]:
    """Refuse an unknown command with a suggestion (argparse would only list)."""
    first = next((a for a in arguments if not a.startswith("-")), None)
    if first is not None and first == arguments[0] and first not in COMMANDS:
        raise ValueError(f"unknown command {first!r}{did_you_mean(first, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    return arguments


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="mmcompress",
        description="Fewer visual, video and audio tokens for Hugging Face multimodal LLMs.",
        usage="mmcompress COMMAND [options]",
        epilog="example:\n  mmcompress run --image cat.jpg --prompt 'What is this?' --keep-ratio 0.25 --compare",
    )
    from mmcompress import __version__

    top.add_argument("--version", action="version", version=f"mmcompress {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (summary, usage, arguments, command, example) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary.split(":")[0],
            usage=f"mmcompress {name} {usage}[--json]",
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
        )
        arguments(sub)
        sub.add_argument("--json", action="store_true", help="print JSON for machines")
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(command=command)
    return top


def emit(value: Any) -> None:
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode))


def progress(text: str) -> None:
    """One line to stderr, rewritten in place on a terminal; elsewhere nothing."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# options that several commands share


KINDS = {"image": "a picture", "video": "a clip", "audio": "a recording"}


def _model_options(p: argparse.ArgumentParser) -> None:
    names = "zoo:image, zoo:video or zoo:audio, whichever fits"
    p.add_argument("--model", metavar="M", help=f"zoo:NAME, a folder or a hub id (default: {names})")


def _item_options(p: argparse.ArgumentParser, several: bool = False) -> None:
    for kind, what in KINDS.items():
        text = what + ("; repeatable" if several else "")
        p.add_argument(f"--{kind}", action="append", default=[], metavar="FILE", help=text)
    p.add_argument("--num-frames", type=int, default=8, metavar="N", help="frames taken of a clip (default: 8)")


def _kinds(args: argparse.Namespace) -> list[str]:
    """The kind of every item on the command line."""
    return [kind for kind in KINDS for _ in getattr(args, kind)]


def _load(args: argparse.Namespace) -> tuple[Any, Any, dict[str, list]]:
    """Model, processor and the items of a `Question`; a broken file is found before the model is loaded."""
    from mmcompress.ask import load_model, sampling_rate
    from mmcompress.media import load_audio, load_image, load_video

    rate = 16000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what a file holds besides its picture
        images, videos = [load_image(p) for p in args.image], [load_video(p, args.num_frames) for p in args.video]
        audio = [load_audio(p, rate) for p in args.audio]
    args.model = f"zoo:{_kinds(args)[0]}" if args.model is None else args.model
    progress(f"loading {args.model}")
    model, processor = load_model(args.model)
    if (wanted := sampling_rate(processor)) != rate:
        audio = [load_audio(p, wanted) for p in args.audio]
    return model, processor, {"images": images, "videos": videos, "audio": audio}


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be an integer >= 1, got {value}")


def _check_folder(path: Path) -> None:
    """Raise ValueError where no folder can be made or written to here: before anything is computed, not after."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written to" if there.is_dir() else "is a file"
        raise ValueError(f"--out must be a folder that can be written to, got {str(path)!r}: {str(there)!r} {why}")


def _method_options(p: argparse.ArgumentParser, several: bool = False) -> None:
    what = "one or several methods, separated by commas" if several else "a method's name; `mmcompress methods` lists them"
    p.add_argument("--method", default="k_center", metavar="NAME", help=f"{what} (default: k_center)")
    p.add_argument("--keep-ratio", metavar="R", help="share of tokens kept, in (0, 1] (default: the method's own)")
    p.add_argument("--layer", metavar="L", help="decoder layer to stand before: an integer, or a share of the depth")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of the method; repeatable")


def _number(text: str) -> Any:
    """An int or a float where the text is one, else the text (the method then says what it wants)."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def compressors(args: argparse.Namespace) -> dict[str, Any]:
    """name -> compressor for every method asked for."""
    fields: dict[str, Any] = {}
    if args.keep_ratio is not None:
        fields["keep_ratio"] = _number(args.keep_ratio)
    if args.layer is not None:
        fields["layer"] = _number(args.layer)
    for pair in args.set:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--set must be FIELD=VALUE, got {pair!r}")
        if name in fields:
            raise ValueError(f"the field {name!r} is given twice")
        try:
            fields[name] = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            fields[name] = value
    for name, value in fields.items():
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name} must be a number of 64 bits, got {value}")
    names = [n.strip() for n in args.method.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"--method must name each method once, got {args.method!r}")
    return {name: named(name, **fields) for name in names}


# run


def _run_arguments(p: argparse.ArgumentParser) -> None:
    _model_options(p)
    _item_options(p, several=True)
    p.add_argument("--prompt", required=True, help="the question")
    _method_options(p)
    length = "length of the reply (default: 32; of a transcript 200 a window)"
    p.add_argument("--max-new-tokens", type=int, metavar="N", help=length)
    p.add_argument("--compare", action="store_true", help="also answer uncompressed, and time both")


def _run(args: argparse.Namespace) -> None:
    if not _kinds(args):
        raise ValueError("a question needs --image, --video or --audio, got none: there is nothing to compress")
    _check_counts(args, "max_new_tokens", "num_frames")
    made = compressors(args)
    if len(made) != 1:
        raise ValueError(f"run takes one method, got {args.method!r}")
    ((name, compressor),) = made.items()
    from mmcompress.ask import Question, ask, prepare
    from mmcompress.eval.loop import TRANSCRIPT

    model, processor, items = _load(args)
    inputs = prepare(model, processor, Question(args.prompt, **items))
    length = args.max_new_tokens or (TRANSCRIPT if getattr(model.config, "is_encoder_decoder", False) else 32)
    answers = {}
    with compressor(model):  # a method that this model cannot serve stops here, before anything is computed
        pass
    if args.compare:
        progress("warming up")
        for first in (create("none"), compressor):
            ask(model, processor, inputs, first, 1)
        progress("answering uncompressed")
        answers["uncompressed"] = ask(model, processor, inputs, create("none"), length)
    progress(f"answering with {name}")
    answers[name] = ask(model, processor, inputs, compressor, length)
    progress("")
    if args.json:
        out: dict[str, Any] = {"model": args.model, "method": compressor.config(), "prompt": args.prompt}
        out |= _answer_json(answers[name])
        if args.compare:
            out["uncompressed"] = _answer_json(answers["uncompressed"])
        emit(out)
        return
    from mmcompress.report import count, gflop, mib, percent, table

    for label, answer in answers.items():
        print(f"{label}: {answer.text}" if args.compare else answer.text)
    print()
    rows = []
    for label, a in answers.items():
        t = a.ledger
        rows.append(
            [
                label,
                f"{count(t.tokens_kept)}/{t.tokens_in}",
                percent(t.tokens_kept, t.tokens_in),
                str(t.separators),
                f"{t.sequence_kept:.0f}",
                mib(t.kv_bytes),
                gflop(t.flops),
                f"{a.prefill_ms:.0f}",
                f"{a.total_ms:.0f}",
            ]
        )
    head = ["", "tokens kept/in", "kept", "separators", "sequence", "KV MiB", "prefill GFLOP", "prefill ms", "whole ms"]
    print(table(head, rows, "lrrrrrrrr"))


def _answer_json(answer: Any) -> dict[str, Any]:
    times = {"prefill_ms": round(answer.prefill_ms, 1), "total_ms": round(answer.total_ms, 1)}
    return {"answer": answer.text, **times, "ledger": answer.ledger.to_json()}


# inspect


def _inspect_arguments(p: argparse.ArgumentParser) -> None:
    _model_options(p)
    _item_options(p)
    p.add_argument("--prompt", default="What is this?", help="the question, for methods that read the text")
    _method_options(p, several=True)
    p.add_argument("--out", default="inspect", metavar="PATH", help="folder, or for one method a .png file (default: inspect)")


def _inspect(args: argparse.Namespace) -> None:
    if len(_kinds(args)) != 1:
        raise ValueError(f"inspect takes one item (--image, --video or --audio), got {len(_kinds(args))}")
    _check_counts(args, "num_frames")
    made = compressors(args)
    paths = _sheets(args.out, Path(*args.image, *args.video, *args.audio), list(made))
    from PIL import Image

    from mmcompress import viz
    from mmcompress.ask import Question, ask, prepare, sampling_rate, seen, window
    from mmcompress.compressor import Chain
    from mmcompress.eval.loop import ratio_of

    file = Path(*args.image, *args.video, *args.audio)
    model, processor, items = _load(args)
    (media,) = (item for kind in items.values() for item in kind)
    if args.video:
        media = [Image.fromarray(frame) for frame in media[0]]
    if args.audio and len(media) > (most := window(processor) or len(media)):
        seconds = [n / sampling_rate(processor) for n in (most, len(media))]
        raise ValueError(
            f"inspect draws one window of sound, at most {seconds[0]:g} s; got {seconds[1]:.1f} s in {str(file)!r}"
        )
    inputs = prepare(model, processor, Question(args.prompt, **items))
    written = []
    for name, compressor in made.items():
        progress(f"asking with {name}")
        answer = ask(model, processor, inputs, compressor, 1)
        item, then = answer.items[0], ""
        if not len(item.anchor) and len(compressor.stages) > 1:  # a chain that drops all in the end: what it had before
            *before, last = compressor.stages
            item = ask(model, processor, inputs, Chain(parts=tuple(before)), 1).items[0]
            place = f"layer {last.layer}" if isinstance(last.layer, int) else f"{last.layer:g} of the decoder's depth"
            then = f"; {last.name} drops them all at {place}"
        pictures = viz.backdrops(seen(processor, media, item.layout, inputs), item.layout, sampling_rate(processor))
        keep = ratio_of(compressor)
        told = ("" if keep is None else f"keep_ratio {keep:g} · ") + viz.describe(item) + then
        sheet = viz.picture_of(item, pictures, f"{name} on {file.name}", told)
        path = paths[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        written.append({"method": compressor.config(), "file": str(path), **answer.ledger.totals()})
    progress("")
    if args.json:
        emit(written)
    else:
        print("\n".join(w["file"] for w in written))


def _sheets(out: str, file: Path, methods: list[str]) -> dict[str, Path]:
    """Where each method's picture goes: --out itself, or a file in it. Raises ValueError for what cannot be written."""
    path = Path(out)
    if path.suffix.lower() == ".png":
        if len(methods) > 1:
            raise ValueError(f"--out must be a folder for several methods, got {out!r}")
        _check_folder(path.parent)
        return {methods[0]: path}
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf", ".svg"):
        raise ValueError(f"--out must be a folder or a .png file, got {out!r}")
    _check_folder(path)
    made = {name: path / f"{file.stem}_{Path(name).name.replace(':', '-')}.png" for name in methods}
    if len(set(made.values())) < len(made):
        raise ValueError(f"--method must name methods and folders whose last parts differ, got {', '.join(methods)}")
    return made


# methods, models, doctor, demo


def _methods(args: argparse.Namespace) -> None:
    from mmcompress.cards import method_rows, show_fields
    from mmcompress.report import table

    rows = method_rows()
    if args.json:
        emit(rows)
        return
    cells = [[r["name"], r["what"], ", ".join(r["reads"]) or "–", show_fields(r["fields"]) or "–"] for r in rows]
    print(table(["method", "what it does", "signals it reads", "fields and defaults"], cells, "llll", wrap=(1, 2, 3)))
    print("\nEvery method also takes layer=L: the decoder layer to stand before (an integer, or a share of the depth).")


def _models(args: argparse.Namespace) -> None:
    from mmcompress import zoo
    from mmcompress.cards import family_rows
    from mmcompress.report import table

    rows = family_rows()
    names = [f"zoo:{n}" for n in zoo.list_models()]
    if args.json:
        emit({"families": rows, "zoo": names})
        return
    cells = [[r["name"], ", ".join(r["modalities"]), ", ".join(r["signals"]), r["notes"] or "–"] for r in rows]
    print(table(["family", "items", "encoder signals", "notes"], cells, "llll", wrap=(3,)))
    print(f"\nReady to use: {', '.join(names)}. Any folder or hub id of these families works with --model.")


def _check_arguments(p: argparse.ArgumentParser) -> None:
    from mmcompress.check import arguments

    arguments(p)


def _check(args: argparse.Namespace) -> int:
    from mmcompress.check import command

    return command(args)


def _doctor(args: argparse.Namespace) -> None:
    from mmcompress import doctor

    report = doctor.examine()
    if args.json:
        emit(report)
    else:
        print(doctor.text(report))


def _demo_arguments(p: argparse.ArgumentParser) -> None:
    from mmcompress.demo import SECTIONS

    names = ",".join(s.name for s in SECTIONS)
    p.add_argument("--out", default="demo", metavar="DIR", help="folder for index.html (default: demo)")
    p.add_argument("--sections", metavar="NAMES", help=f"sections, separated by commas (default: {names})")
    p.add_argument("--num-questions", type=int, metavar="N", help="questions of each section (default: its own number)")


def _demo(args: argparse.Namespace) -> None:
    from mmcompress import demo

    _check_counts(args, "num_questions")
    sections = demo.chosen(args.sections)
    _check_folder(Path(args.out))
    result = demo.run(sections, args.num_questions)
    path = demo.write(result, Path(args.out))
    if args.json:
        emit({**result.to_json(), "page": str(path)})
    else:
        print(demo.text(result))
        print(f"\nThe page with the pictures: {path}")


def _bench_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--models", metavar="M,…", help="names of the zoo, folders or hub ids (default: image)")
    p.add_argument("--tasks", metavar="T,…", help="tasks, such as easy_vqa or detail:small (default: detail)")
    p.add_argument("--methods", metavar="NAME,…", help="methods; controls are always added (default: k_center)")
    p.add_argument("--keep-ratio", metavar="R,…", help="shares of tokens kept (default: 0.25)")
    p.add_argument("--n", type=int, metavar="N", help="test questions of each task (default: 200)")
    p.add_argument("--seeds", metavar="S,…", help="seeds of methods with a field `seed` (default: 0)")
    p.add_argument("--samples-seed", type=int, metavar="S", help="seed of the questions (default: 0)")
    p.add_argument("--preset", metavar="NAME", help="a plan that the package brings, or a .json file, in place of the above")
    p.add_argument("--timing", action="store_true", help="also time prefills: medians, and each method's own cost")
    p.add_argument("--dtype", metavar="D", help="float32, bfloat16, float16, or auto (default: the preset's, else float32)")
    p.add_argument("--fresh", action="store_true", help="measure again what --out holds already")
    p.add_argument("--out", metavar="DIR", help="folder for results, table and plot (default: runs/bench)")


BENCH: dict[str, list[Any]] = {
    "models": ["image"],
    "tasks": ["detail"],
    "methods": ["k_center"],
    "keep_ratio": [0.25],
    "seeds": [0],
}


def _bench(args: argparse.Namespace) -> None:
    from mmcompress.ask import quiet
    from mmcompress.eval.bench import Sweep, bench, files, load_preset, text
    from mmcompress.eval.loop import pick_dtype

    given = {name: getattr(args, name) for name in ("models", "tasks", "methods", "keep_ratio", "seeds", "n", "samples_seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.preset is not None:
        if given.keys() - {"n"}:
            raise ValueError(f"--preset takes the place of --{sorted(given.keys() - {'n'})[0].replace('_', '-')}, got both")
        sweeps, path, dtype = load_preset(args.preset)
        out, stem = (path.parent, path.name) if args.out is None else (Path(args.out), "results")
        for sweep in sweeps:
            sweep.n = given.get("n", sweep.n)
    else:
        lists: dict[str, list[Any]] = {name: [v.strip() for v in given[name].split(",")] for name in BENCH if name in given}
        for name in ("keep_ratio", "seeds"):
            lists |= {name: [_number(v) for v in lists[name]]} if name in lists else {}
        sweeps = [Sweep(**BENCH | lists, n=given.get("n", 200), seed=given.get("samples_seed", 0))]
        out, stem, dtype = Path(args.out or "runs/bench"), "results", "float32"
    dtype = dtype if args.dtype is None else args.dtype
    pick_dtype(dtype)
    _check_folder(out)
    quiet()
    options: dict[str, Any] = {"dtype": dtype, "timing": args.timing, "fresh": args.fresh, "progress": not args.json}
    report = bench(sweeps, out, stem=stem, **options)
    if args.json:
        emit({**report.to_json(), "files": {k: str(p) for k, p in files(out, stem).items()}})
        return
    print(text(report))
    print("\nWritten: " + ", ".join(str(p) for p in files(out, stem).values() if p.exists()))


def _nothing(p: argparse.ArgumentParser) -> None:
    """No options of its own."""


COMMANDS: dict[str, tuple[str, str, Callable, Callable, str]] = {
    "demo": (
        "ask questions about pictures, clips and recordings: uncompressed, and with every method; writes a page",
        "[--out DIR] [--sections NAMES] [--num-questions N] ",
        _demo_arguments,
        _demo,
        "mmcompress demo --out demo",
    ),
    "run": (
        "answer a question with fewer tokens: about pictures, clips or recordings",
        "--prompt TEXT --image FILE [options] ",
        _run_arguments,
        _run,
        "mmcompress run --image cat.jpg --prompt 'What is this?' --method k_center --keep-ratio 0.25 --compare",
    ),
    "inspect": (
        "draw what a method keeps, drops and merges: one picture per method",
        "--image FILE | --video FILE | --audio FILE [options] ",
        _inspect_arguments,
        _inspect,
        "mmcompress inspect --image cat.jpg --method k_center,global_guided --keep-ratio 0.25 --out inspect",
    ),
    "bench": (
        "measure methods on tasks: accuracy with intervals, cost, differences to the controls; goes on where it was stopped",
        "[options] ",
        _bench_arguments,
        _bench,
        "mmcompress bench --models image --tasks easy_vqa,detail --methods k_center,pooling --keep-ratio 0.5,0.1 --n 100",
    ),
    "methods": ("list the methods: their signals and fields", "", _nothing, _methods, "mmcompress methods"),
    "models": ("list the model families, and the ready models", "", _nothing, _models, "mmcompress models"),
    "check": (
        "check a model: whether it answers with any method as the stock model would, one line per check",
        "MODEL [options] ",
        _check_arguments,
        _check,
        "mmcompress check smolvlm",
    ),
    "doctor": (
        "show what is installed: versions, which kernels run and why, what would make it faster",
        "",
        _nothing,
        _doctor,
        "mmcompress doctor",
    ),
}
"""name -> (summary, options in short, function that adds them, function that runs, example)."""


if __name__ == "__main__":
    sys.exit(main())
