"""What is sent to a cluster with a job: the code of a folder, not its data.

The package is a zip file of which everything is known before it travels. Equal files make equal
bytes, so that Ray keeps one copy of them.
"""

from __future__ import annotations

import os
import shlex
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from raycompress.config import JobConfig
from raycompress.errors import ConfigError
from raycompress.hiding import hidden, is_secret
from raycompress.loading import load_job

__all__ = ["MAX_BYTES", "Files", "Submission", "find_files", "pack", "prepare_submission"]

MAX_BYTES = 100 * 1024**2
"""Ray's job server takes no larger request (its own message speaks of more)."""

IGNORED = (
    *(
        ".git/",
        ".hg/",
        ".svn/",
        "node_modules/",
        "__pycache__/",
        "*.egg-info/",
        ".ipynb_checkpoints/",
    ),
    *(
        ".mypy_cache/",
        ".ruff_cache/",
        ".pytest_cache/",
        ".hypothesis/",
        ".tox/",
        ".nox/",
        ".cache/",
    ),
    *("mlruns/", "mlartifacts/", "mlflow.db*", "wandb/", "lightning_logs/", ".DS_Store"),
    *("*.pt", "*.pth", "*.pt2", "*.ckpt", "*.safetensors", "*.onnx", "*.engine", "*.tflite"),
    *("*.npy", "*.npz", "*.h5", "*.hdf5", "*.parquet", "*.arrow", "*.lmdb", "*.tfrecord", "*.db"),
    *("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.tar.xz", "*.whl", "*.so", "*.pyc"),
    *(".env", ".netrc", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".aws/", ".ssh/"),
)
"""Patterns, as in .gitignore, of what isn't sent: caches, stores, weights, data and secrets."""
DATA = {"data", "datasets", "dataset", "checkpoints", "outputs", "output", "runs", "logs", "build"}
"""Folders that aren't sent unless they are Python packages."""
IGNORE_FILES = (".gitignore", ".rayignore")


@dataclass(frozen=True)
class Files:
    """What of a folder is sent.

    Attributes:
        folder: Absolute.
        sizes: Bytes by path, relative to the folder; in order.
    """

    folder: Path
    sizes: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Submission:
    """A job on its way to a cluster.

    Attributes:
        name: Of the job.
        files: What is sent.
        arguments: Of `raycompress run`, relative to the folder.
        output: Where the job writes, on the cluster; None: its default.
    """

    name: str
    files: Files
    arguments: tuple[str, ...]
    output: str | None

    def entrypoint(self, python: str) -> str:
        """The command on the cluster; it takes the shell's place, so that signals reach it."""
        return f"exec {python} -m raycompress run {shlex.join(self.arguments)}"


def prepare_submission(
    job: Path,
    overrides: Sequence[str],
    output: str | None,
    folder: Path,
    *,
    changed: bool = False,
) -> Submission:
    """Checks a job here, as far as it can be without its data and machine, and finds its files.

    Args:
        job: Its file, below the folder.
        overrides: `--set` texts.
        output: `--output`.
        folder: The working directory there.
        changed: `--changed`.

    Raises:
        ConfigError: The job is wrong, or can't be sent.
    """
    folder = folder.absolute()
    config = load_job(job, overrides)
    path = _below(job, folder)
    if path is None:
        raise ConfigError(
            f"{job} isn't below the working directory {folder}, which is what the cluster gets; "
            "give --working-dir"
        )
    _check_reach(config, overrides, output)
    wanted = [path]
    if config.model.weights is not None:
        weights = Path(config.model.weights).expanduser()
        inside = _below(folder / weights, folder)
        if inside is not None and not weights.is_absolute():
            wanted.append(inside)
    arguments = [path, *(part for text in overrides for part in ("--set", text))]
    arguments += ["--output", output] if output is not None else []
    arguments += ["--changed"] if changed else []
    files = find_files(folder, wanted)
    return Submission(config.name, files, tuple(arguments), output or config.output)


def _check_reach(config: JobConfig, overrides: Sequence[str], output: str | None) -> None:
    """What would not be the same on the cluster."""
    place = output if output is not None else config.output
    if place is not None and "://" not in place and not place.startswith(("/", "~")):
        raise ConfigError(
            f"output must be an absolute path or a URI, got {place!r}: a submitted job's working "
            "directory is thrown away"
        )
    if config.cluster.address is not None:
        raise ConfigError(
            f"cluster.address must be empty in a submitted job, which uses the cluster that it "
            f"runs on, got {config.cluster.address!r}"
        )
    for text in overrides:
        key, _, value = text.partition("=")
        if hidden({key.rpartition(".")[2]: value}) != {key.rpartition(".")[2]: value}:
            shown = "***" if is_secret(key.rpartition(".")[2]) else hidden(value)
            raise ConfigError(
                f"--set {key}={shown}: a secret in a command can be read on Ray's dashboard; put "
                "it into the job file, or into the cluster's environment "
                "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"
            )


def _below(path: Path, folder: Path) -> str | None:
    """A path relative to a folder, or None if it is outside."""
    # Not resolved: a link in the folder to a file elsewhere is sent as that file.
    absolute = Path(os.path.normpath(path.absolute()))
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else None


def find_files(folder: Path, wanted: Iterable[str] = ()) -> Files:
    """What of a folder is sent: neither `IGNORED`, nor named by a .gitignore or .rayignore.

    Args:
        folder: Walked; links to folders aren't followed.
        wanted: Sent in any case; relative to the folder.

    Raises:
        ConfigError: It is too much, with the largest files, or a wanted file isn't there.
    """
    sizes = {name: (folder / name).stat().st_size for name in _walk(folder, folder, ())}
    for name in wanted:
        if not (folder / name).is_file():
            raise ConfigError(f"no file {folder / name}, which the job names")
        sizes[name] = (folder / name).stat().st_size
    files = Files(folder, dict(sorted(sizes.items())))
    if files.num_bytes > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        listed = ", ".join(f"{name} ({_mib(sizes[name])})" for name in largest)
        raise ConfigError(
            f"working directory {folder} has {len(sizes)} files with {_mib(files.num_bytes)} in "
            f"all to send, and Ray takes {_mib(MAX_BYTES)}; the largest: {listed}. Name what "
            "isn't code in .rayignore, and put data where the cluster's machines can read it"
        )
    return files


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:.1f} MiB"


Spec = tuple[Path, GitIgnoreSpec]


def _walk(folder: Path, root: Path, outer: tuple[Spec, ...]) -> Iterator[str]:
    specs = outer if outer else ((root, GitIgnoreSpec.from_lines(IGNORED)),)
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(errors="replace").splitlines()
            specs = (*specs, (folder, GitIgnoreSpec.from_lines(lines)))
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        if _ignored(path, is_folder, specs):
            continue
        if is_folder:
            if not _is_environment(path) and not _is_data(path):
                yield from _walk(path, root, specs)
        elif path.is_file():
            yield path.relative_to(root).as_posix()


def _ignored(path: Path, is_folder: bool, specs: Iterable[Spec]) -> bool:
    for base, spec in specs:
        text = path.relative_to(base).as_posix()
        if spec.match_file(f"{text}/" if is_folder else text):
            return True
    return False


def _is_environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").is_dir()


def _is_data(folder: Path) -> bool:
    return folder.name.lower() in DATA and not (folder / "__init__.py").exists()


def pack(files: Files, path: Path) -> None:
    """Writes the zip file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files.sizes:
            # No times of change: the same files make the same package.
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            mode = (files.folder / name).stat().st_mode & 0o777
            entry.external_attr = (0o100000 | mode) << 16
            archive.writestr(entry, (files.folder / name).read_bytes())
