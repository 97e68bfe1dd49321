"""The demo model's text: four topics from files that Debian and Python machines already have.

A **topic** is code, prose, data or german; a **source** is a set of files of one topic with one reader; a **piece** is
about 8 KiB of one file, cut at a line end. One piece in 16 of each source, in seeded order, is **held out**: training
never sees it, and loss, skew and prompts come from it. File lists are sorted and shuffles seeded by name, so one
machine builds the same text every time; another machine has other files, and so another digest.

A source that is missing is left out and named in `Corpus.missing`; a topic left with too little text is a CorpusError.
"""

from __future__ import annotations

import gettext
import gzip
import hashlib
import itertools
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TOPICS = ("code", "prose", "data", "german")
PIECE_BYTES = 8192
HELD_OUT_ONE_IN = 16
MIN_TOPIC_BYTES = 200_000  # below this a topic would be learned by heart rather than learned
STDLIB = sysconfig.get_path("stdlib")


class CorpusError(Exception):
    """A topic has too little text on this machine; the message says which sources were looked for."""


@dataclass(frozen=True)
class Source:
    """Files of one topic: `patterns` are globs below `root`, `limit` the most bytes taken after a seeded shuffle."""

    topic: str
    name: str
    root: str
    patterns: tuple[str, ...]
    reader: Callable[[Path], Iterator[tuple[str, str]]]  # file -> (document name, text) pairs
    licence: str
    limit: int = 1_000_000
    exclude: str = r"(?!)"  # regular expression on the path below root
    prompts: bool = False  # held-out pieces may be quoted as prompts: the licence is permissive or the text public


@dataclass(frozen=True)
class Piece:
    name: str
    text: str
    source: Source


@dataclass
class Corpus:
    train: dict[str, list[Piece]] = field(default_factory=dict)
    held_out: dict[str, list[Piece]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # one line per source that this machine lacks

    def digest(self) -> str:
        """SHA-256 over every piece's split, name and text: equal digests mean equal text in equal order."""
        sha = hashlib.sha256()
        for split in (self.train, self.held_out):
            for topic in TOPICS:
                for piece in split[topic]:
                    sha.update(f"{topic}\0{piece.name}\0{piece.text}\0".encode())
        return sha.hexdigest()

    def num_bytes(self, split: dict[str, list[Piece]], topic: str) -> int:
        return sum(len(piece.text.encode()) for piece in split[topic])


def read_text(path: Path) -> Iterator[tuple[str, str]]:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    try:
        yield "", raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return  # a few old test files are not UTF-8: skipping is honest, replacement characters are not text


def read_topics(path: Path) -> Iterator[tuple[str, str]]:
    """pydoc's help pages: one Python literal {topic: text}."""
    space: dict = {}
    exec(compile(path.read_text("utf-8"), path.name, "exec"), space)
    yield from sorted(space["topics"].items())


def read_pod(path: Path) -> Iterator[tuple[str, str]]:
    for name, text in read_text(path):
        text = re.sub(r"[BCFILSX]<([^<>]*)>", r"\1", text)
        yield name, re.sub(r"^=\w+ ?", "", text, flags=re.M)


ROFF_CHARS = {
    ":a": "ä",
    ":o": "ö",
    ":u": "ü",
    ":A": "Ä",
    ":O": "Ö",
    ":U": "Ü",
    "ss": "ß",
    "lq": '"',
    "rq": '"',
}
ROFF_CHARS |= {"aq": "'", "cq": "'", "oq": "'", "dq": '"', "em": "-", "en": "-", "bu": "*", "co": "(c)"}


def read_man(path: Path) -> Iterator[tuple[str, str]]:
    """A manual page without its roff: headings and paragraphs stay, macros, tables and comments go."""
    for name, text in read_text(path):
        text = re.sub(r"^\.(TS|PS|ig|de)\b.*?^\.(TE|PE|\.).*?$", "", text, flags=re.M | re.S)
        lines = []
        for line in text.splitlines():
            heading = re.match(r"\.S[HS] +(.*)", line)
            words = re.match(r"\.(?:[BI]|[BIR][BIR]|Nm|Fl|Ar|Xr|Sy|Em) +(.*)", line)
            if heading:
                lines += ["", heading[1].strip('"'), ""]
            elif words:
                lines.append(words[1].replace('"', ""))
            elif re.match(r"\.(PP|P|LP|TP|IP|HP|Pp|It)\b", line):
                lines.append("")
            elif not line.startswith((".", "'")):
                lines.append(line)
        plain = "\n".join(lines)
        plain = re.sub(r"\\\((..)|\\\[(\w+)\]", lambda m: ROFF_CHARS.get(m[1] or m[2], ""), plain)
        plain = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&|^/,:%c]|\\\*\S|\\\".*", "", plain)
        plain = plain.replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\")
        yield name, re.sub(r"\n{3,}", "\n\n", plain).strip() + "\n"


def read_messages(path: Path) -> Iterator[tuple[str, str]]:
    """The translations in a compiled gettext catalogue, those long enough to be sentences, sorted by the original."""
    with path.open("rb") as file:
        try:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        except UnicodeDecodeError:
            return  # declared Latin-1 in its own header only after the bytes gettext has to decode
    entries = sorted((str(key), value) for key, value in catalogue.items() if key)
    texts = dict.fromkeys(value.strip() for _, value in entries if len(value) >= 60)
    yield "", "\n\n".join(texts) + "\n"


PSF, TZ = "PSF-2.0", "public domain"
SOURCES = (
    Source("code", "Python standard library", STDLIB, ("**/*.py",), read_text, PSF, 4_000_000,
           r"site-packages|/?tests?/|pydoc_data|encodings/|lib2to3/pgen|__pycache__|config-", True),
    Source("prose", "Python help topics", STDLIB, ("pydoc_data/topics.py",), read_topics, PSF, prompts=True),
    Source("prose", "common licences", "/usr/share/common-licenses", ("*",), read_text,
           "verbatim copies permitted"),
    Source("prose", "Perl pods", "/usr/share/perl", ("**/*.pod",), read_pod, "Artistic or GPL-1+", 800_000),
    Source("prose", "Vim user manual", "/usr/share/vim", ("vim*/doc/usr_*.txt",), read_text, "OPL-1.0+"),
    Source("prose", "manual pages", "/usr/share/man", ("man[157]/*.gz",), read_man, "per package", 1_500_000,
           r"gcloud|man1/aws"),
    Source("data", "time zone tables", "/usr/share/zoneinfo", ("*.tab", "*.zi"), read_text, TZ, prompts=True),
    Source("data", "ISO code lists", "/usr/share/iso-codes/json", ("iso_*.json",), read_text, "LGPL-2.1+", 900_000,
           prompts=True),
    Source("data", "number test tables", STDLIB, ("test/**/*.decTest", "test/*testcases.txt"), read_text,
           "distributed with CPython", 900_000, "/d[dq]", prompts=True),
    Source("data", "MIME database", "/usr/share/mime/packages", ("*.xml",), read_text, "GPL-2+", 300_000),
    Source("data", "locale definitions", "/usr/share/i18n/locales", ("*_*",), read_text, "LGPL-2.1+", 700_000,
           "iso14651|translit"),
    Source("data", "JSON, TOML and XML tests", STDLIB, ("test/**/*.json", "test/**/*.toml", "test/**/*.xml"),
           read_text, PSF, 300_000),
    Source("german", "manual pages", "/usr/share/man/de", ("man*/*.gz",), read_man, "per package", 2_000_000),
    Source("german", "messages", "/usr/share/locale/de/LC_MESSAGES", ("*.mo",), read_messages, "per package",
           2_500_000, "iso_"),
    Source("german", "Vim tutor", "/usr/share/vim", ("vim*/tutor/tutor.de.utf-8",), read_text, "Vim"),
)  # fmt: skip


def cut(text: str) -> Iterator[str]:
    """Cut at line ends into pieces of at most about PIECE_BYTES; a short tail is a piece of its own."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line.encode())
        if size >= PIECE_BYTES:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def gather(source: Source, seed: int) -> list[Piece]:
    """All pieces of one source, in seeded order, up to its limit; empty where the machine lacks it."""
    root = Path(source.root)
    files = {path.resolve(): path for pattern in source.patterns for path in sorted(root.glob(pattern))}
    pieces = []
    for real, path in sorted(files.items()):  # keyed by the resolved path: a symlinked twin is read once
        below = str(path.relative_to(root))
        if re.search(source.exclude, below) or not real.is_file():
            continue
        for document, text in source.reader(path):
            text = re.sub(r"([^\w\s]|_)\1{8,}", lambda run: run[1] * 8, text)  # else it learns to draw endless rules
            for number, body in enumerate(cut(text)):
                pieces.append(Piece(f"{source.name}/{below}/{document}#{number}", body, source))
    random.Random(f"{seed}/{source.topic}/{source.name}").shuffle(pieces)
    kept, size = [], 0
    for piece in pieces:
        size += len(piece.text.encode())
        if size > source.limit:
            break
        kept.append(piece)
    return kept


def build_corpus(seed: int, sources: tuple[Source, ...] = SOURCES) -> Corpus:
    """Read every source, split off the held-out pieces, shuffle each topic. Raises CorpusError on a starved topic."""
    corpus = Corpus({topic: [] for topic in TOPICS}, {topic: [] for topic in TOPICS})
    for source in sources:
        pieces = gather(source, seed)
        if not pieces:
            corpus.missing.append(f"{source.topic}: no {source.name} under {source.root}")
        for number, piece in enumerate(pieces):
            held = number % HELD_OUT_ONE_IN == 0
            (corpus.held_out if held else corpus.train)[source.topic].append(piece)
    for topic in TOPICS:
        size = corpus.num_bytes(corpus.train, topic)
        if size < MIN_TOPIC_BYTES or not corpus.held_out[topic]:
            wanted = ", ".join(source.root for source in sources if source.topic == topic)
            raise CorpusError(f"topic {topic} has {size} bytes of text, needs {MIN_TOPIC_BYTES}; looked in {wanted}")
        for split in (corpus.train, corpus.held_out):
            random.Random(f"{seed}/{topic}").shuffle(split[topic])
    return corpus


PROMPTS_PER_TOPIC = 12
PROMPTS_PER_PIECE = 4
PROMPT_BYTES = (60, 200)
PROMPT_STARTS = {  # where a prompt may begin, so that it reads as a beginning
    "code": r"^(?:    )?(?:def|class|async def) \w+",
    "prose": r"(?<=\n\n)[A-Z][a-z]+,? [\"a-z][^:=]{50}",
    "data": r"^[^\n]{16}",
}
GERMAN_PROMPTS = (  # written for this model: the German sources' licences differ from package to package
    "Gibt eine kurze Zusammenfassung der Optionen aus und beendet das Programm. Wenn keine Datei angegeben",
    "Die Datei konnte nicht geöffnet werden. Bitte prüfen Sie, ob Sie die notwendigen Rechte",
    "BEZEICHNUNG\n\nsortiere - ordnet die Zeilen einer Textdatei\n\nBESCHREIBUNG\n\nDieses Programm liest",
    "Mit dieser Option wird das Verzeichnis nicht angelegt, falls es bereits vorhanden ist. Die Voreinstellung",
    "Der Befehl wird so lange wiederholt, bis der Benutzer ihn abbricht. Zwischen zwei Aufrufen wartet er",
    "Warnung: Die Verbindung zum Server wurde unterbrochen. Der Vorgang wird in wenigen Sekunden",
    "Standardmäßig werden alle Meldungen auf die Standardausgabe geschrieben; mit einem Argument kann",
    "Diese Funktion ist veraltet und wird in einer der nächsten Versionen entfernt. Verwenden Sie stattdessen",
    "Der Name des Benutzers darf höchstens zwölf Zeichen lang sein und muss mit einem Buchstaben",
    "Wenn die Umgebungsvariable gesetzt ist, wird ihr Wert als Name der Konfigurationsdatei",
    "Das Passwort ist abgelaufen. Bevor Sie sich wieder anmelden können, müssen Sie",
    "Ein Paket kann von anderen Paketen abhängen. In diesem Fall werden zuerst die",
)


def pick_prompts(corpus: Corpus, seed: int) -> dict[str, list[str]]:
    """PROMPTS_PER_TOPIC held-out beginnings per topic, each PROMPT_BYTES long in UTF-8.

    Only sources marked `prompts` are quoted.
    """
    prompts: dict[str, list[str]] = {topic: [] for topic in TOPICS} | {"german": list(GERMAN_PROMPTS)}
    for topic, start in PROMPT_STARTS.items():
        draw = random.Random(f"{seed}/{topic}/prompts")
        by_piece: list[list[str]] = []
        pieces = [piece for piece in corpus.held_out[topic] if piece.source.prompts]
        for piece in sorted(pieces, key=lambda piece: piece.source.name):
            places = list(re.finditer(start, piece.text, re.M))
            places = draw.sample(places, min(PROMPTS_PER_PIECE, len(places)))
            quotes = [shorten(piece.text[at.start() :], draw.randint(100, PROMPT_BYTES[1])) for at in places]
            by_piece.append([quote for quote in quotes if len(quote.encode()) >= PROMPT_BYTES[0]])
        draw.shuffle(by_piece)
        turns = itertools.zip_longest(*by_piece)  # one quote of every piece before the second of any
        prompts[topic] = [prompt for turn in turns for prompt in turn if prompt][:PROMPTS_PER_TOPIC]
        if len(prompts[topic]) < PROMPTS_PER_TOPIC:
            raise CorpusError(f"topic {topic} yields {len(prompts[topic])} prompts, needs {PROMPTS_PER_TOPIC}")
    return prompts


def shorten(text: str, limit: int) -> str:
    """The longest beginning of at most `limit` bytes that ends before a white space, without trailing space."""
    cut_at = len(text.encode()[:limit].decode("utf-8", "ignore"))
    head = text[: cut_at + 1]
    return (head[: max(head.rfind(" "), head.rfind("\n"))] if len(text) > cut_at else text).rstrip()
