"""What the documents promise: their commands, code blocks, links and paths, read from Markdown."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path for folder in (ROOT, ROOT / "docs", ROOT / "examples") for path in folder.glob("*.md"))
FOLDERS = ("python", "test", "docs", "examples", "scripts", "benchmark", ".github", ".ci")

# An inline code span that is a command and not the name of something. `equipoise` alone is the algorithm.
COMMAND_SPAN = re.compile(
    r"(?:\w+=\S+ )*(?:make\b|(?:\.venv/bin/)?equipoise (?:-|[a-z-]+\b(?![,:;.]))|\.venv/bin/|python3? |pip |curl |git "
    r"|pre-commit |sglang )"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH_SPAN = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|toml|txt|png|yml|yaml|in)|[\w.-]+(?:/[\w.-]+)*/")


@dataclass(frozen=True)
class Document:
    """One Markdown file, taken apart."""

    path: Path
    text: str = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def blocks(self, *languages: str) -> list[str]:
        """Contents of the fenced blocks in one of the languages."""
        return [body for language, body in FENCE.findall(self.text) if language in languages]

    def spans(self) -> list[str]:
        """Inline code, outside of fenced blocks; line breaks in it are blanks."""
        prose = FENCE.sub("", self.text)
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]

    def commands(self) -> list[str]:
        """Lines of shell blocks, continuation lines joined, and inline code that reads as a command."""
        found = []
        for block in self.blocks("bash", "sh", "console", "shell"):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(shlex.split(line.removeprefix("$ "), comments=True, posix=False))
                if command:
                    found.append(command)
        return found + [span for span in self.spans() if COMMAND_SPAN.match(span)]

    def links(self) -> list[str]:
        """Targets of links and images that are not on the web."""
        return [target for target in re.findall(r"\]\(([^)\s]+)\)", self.text) if "://" not in target]

    def paths(self) -> list[str]:
        """Inline code that names a file or a folder of the tree."""
        return [span for span in self.spans() if PATH_SPAN.fullmatch(span)]


def read_documents() -> list[Document]:
    return [Document(path, path.read_text()) for path in DOCUMENTS]


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def tree_files() -> list[Path]:
    """Files of the tree, relative to it: what git lists, or in a source distribution whatever was not made."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return [Path(name) for name in listed if (ROOT / name).is_file()]
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts]


def tree_paths() -> set[str]:
    """Every file and folder (with a slash at its end) of the tree."""
    files = tree_files()
    folders = {parent for file in files for parent in file.parents if parent.name}
    return {file.as_posix() for file in files} | {f"{folder.as_posix()}/" for folder in folders}


def make_targets() -> list[str]:
    return re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)


def copy_tree(folder: Path) -> Path:
    """A copy as a new clone would be, with nothing that was made; its .venv is a link to the one that runs."""
    for file in tree_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run_command(command: str, folder: Path, environment: dict[str, str], timeout: float) -> str:
    """Runs a line in ``folder`` and returns what it printed; an exit code other than 0 is an AssertionError."""
    # The environment is there already, whatever its age: a test must not install anything.
    command = re.sub(r"^make\b", "make -o .venv/.ready", command)
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\nends with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def run_server(command: str, folder: Path, environment: dict[str, str], timeout: float) -> str:
    """Starts a server, waits until it says that it is ready, and asks it to end, which it must do with exit code 0."""
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port 0"], cwd=folder, env=environment, stdout=output, stderr=output
        )
        try:
            while "ready:" not in log.read_text():
                timeout -= 0.5
                assert timeout > 0, f"{command} is not ready:\n{log.read_text()[-4000:]}"
                try:
                    code = server.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
                raise AssertionError(f"{command} ended with {code}:\n{log.read_text()[-4000:]}")
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0, log.read_text()[-4000:]
        finally:
            server.kill()
    return log.read_text()
