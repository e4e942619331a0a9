"""What an output directory holds when prepare starts: a finished corpus, an unfinished run, or nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError
from .manifest import Manifest, load_manifest
from .shards import file_sha256, write_atomically
from .sources import InputFile, real_path

BOILERPLATE = "boilerplate.npy"  # in the work folder: hashes of the lines to remove


def describe(files: list[InputFile]) -> list[dict[str, Any]]:
    """The files as the plan and the manifest list them, with what tells whether one has changed."""
    return [dataclasses.asdict(file) for file in files]


def find_finished(out: Path, options: dict[str, Any], files: list[InputFile]) -> Manifest | None:
    """The corpus in `out` if these files and options made it, None if there is no finished corpus.

    Raises:
        ConfigurationError: others made it.
    """
    if not (out / "manifest.json").exists():
        return None
    manifest = load_manifest(out)
    _refuse_other_options(manifest.contents["options"], options, f"{out}: holds a finished corpus")
    now = {one["path"]: one for one in describe(files)}
    then = {one["path"]: one for one in manifest.contents["files"]}
    changed = [path for path in {**now, **then} if now.get(path) != then.get(path)]
    if changed:
        raise ConfigurationError(
            f"{out}: holds a finished corpus, but {changed[0]} was changed, added or removed since; give another --out, "
            "remove the directory to prepare it again, or add new files with --append"
        )
    return manifest


def find_base(
    out: Path, options: dict[str, Any], files: list[InputFile]
) -> tuple[Manifest, dict[str, Any], list[InputFile]]:
    """What --append starts from.

    Args:
        options: this run's; it need not name the tokenizer, which is the corpus's.
        files: this run's; those that are in the corpus already are passed over.
    Returns:
        The corpus, the options of the whole afterwards, and the files to append.
    Raises:
        ConfigurationError: there is no corpus, other options made it, one of its files has changed since, or a file seems
            to be one of its files in another place.
    """
    if not (out / "manifest.json").exists():
        raise ConfigurationError(f"{out}: no finished corpus to append to; prepare one first, without --append")
    base = load_manifest(out)
    made_with = base.contents["options"]
    wanted = {name: value for name, value in options.items() if name != "inputs"}
    for name in ("tokenizer_sha256", "train_tokenizer"):
        if wanted[name] is None:
            del wanted[name]
    _refuse_other_options(
        {**made_with, "tokenizer_sha256": base.tokenizer_sha256}, wanted, f"{out}: holds a finished corpus"
    )
    known = {real_path(one["path"]): one for one in base.contents["files"]}
    places = {(Path(one["path"]).name, one["size"], one["modified"]): one["path"] for one in known.values()}
    new = []
    for file in files:
        entry = known.get(real_path(file.path))
        if entry is None:
            # A path in the manifest may be relative to a directory other than today's.
            place = places.get((Path(file.path).name, file.size, file.modified))
            if place and isinstance(file.modified, int):
                raise ConfigurationError(
                    f"{file.path}: has the name, size and time of {place}, which is part of {out} already; leave it out, "
                    "or touch it if it is another file"
                )
            new.append(file)
        elif {**entry, "path": file.path} != dataclasses.asdict(file):
            raise ConfigurationError(
                f"{file.path}: changed since it became part of {out}; give new text in new files, or prepare all of it "
                "again with another --out"
            )
    inputs = list(dict.fromkeys([*made_with["inputs"], *options["inputs"]]))
    return base, {**made_with, "inputs": inputs}, new


def _refuse_other_options(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise ConfigurationError(
                f"{what} with {name} = {found.get(name)}, this run has {wanted[name]}; give the same options, or "
                "another --out, or remove the directory"
            )


def resume(work: Path, options: dict[str, Any], files: list[InputFile], base: Manifest | None) -> None:
    """Compare an unfinished run's plan with this one, and remove whatever came from files that have changed since.

    Args:
        work: the directory of the unfinished run; this run's plan.json is written there.
        base: the corpus that is appended to.
    Raises:
        ConfigurationError: the unfinished run has other options or files, or `base` has changed.
        DataError: its plan is damaged.
    """
    for leftover in [*work.glob("*.tmp"), *work.parent.glob("*.tmp")]:
        if leftover.is_file():  # tokenizer.tmp is a directory, removed before it is next written
            leftover.unlink()
    if base and load_manifest(work.parent) != base:
        raise ConfigurationError(f"{work.parent}: another run has just changed it; run the same command again")
    extends = file_sha256(work.parent / "manifest.json") if base else None
    described = describe(files)
    path = work / "plan.json"
    if found := _load_plan(path, extends):
        _refuse_other_options(found["options"], options, f"{work.parent}: holds an unfinished run")
        if [file["path"] for file in found["files"]] != [file["path"] for file in described]:
            raise ConfigurationError(
                f"{work.parent}: holds an unfinished run over other files; give the same files, or another --out, or "
                "remove the directory"
            )
        changed = [number for number, file in enumerate(described) if file != found["files"][number]]
        for number in changed:
            print(f"{files[number].path}: changed since the run began, so it is done again", file=sys.stderr)
            _remove(work, f"{number:06d}-*.npz")
        if changed and (options["train_tokenizer"] or options["boilerplate"]) and not base:
            _remove(work, "*.npz", "tokenizer", BOILERPLATE)
    else:
        _remove(work, "*.npz", "tokenizer", BOILERPLATE)
    with write_atomically(path) as file:
        plan = {"options": options, "files": described, "extends": extends}
        file.write(json.dumps(plan, indent=1).encode())


def _load_plan(path: Path, extends: str | None) -> dict[str, Any] | None:
    """The plan of an unfinished run that this one must agree with, None if there is none.

    A plan is void while nothing has come of it, because the first try failed, and once the corpus has changed that it
    would have extended.
    """
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_bytes())
        has_result = any(path.parent.glob("*.npz"))
        has_result |= (path.parent / BOILERPLATE).exists()
        has_result |= bool(plan["options"]["train_tokenizer"]) and (path.parent / "tokenizer").exists()
        return plan if has_result and plan["extends"] == extends else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {path.parent} and start again") from error


def _remove(work: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in work.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
