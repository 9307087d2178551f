"""The run directory's one source of truth: a SQLite file, written as the run goes, read by everything after it.

The harness writes; reports, the gate and diagnostics only read, and need neither a model nor torch.

A run advances in units: one window of samples (in data order) against one attack. A unit is written in one
transaction together with its time, so that whatever happens to the process, a unit is there whole or not at
all, and a resumed run makes the same batches, hence the same numbers, as an uninterrupted one.
"""

import errno
import json
import math
import re
import sqlite3
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import MISSING, dataclass, fields
from heapq import nsmallest
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robust.errors import InputError
from robust.options import Options
from robust.statistics import SUMMARY_COLUMNS, WORST_CASE, wilson
from robust.text import visible

FILENAME = "run.sqlite"
BUSY = "another process is writing this run; wait until it is done"

_DEFAULTS = {option.name: option.default for option in fields(Options) if option.default is not MISSING}

# History of the schema, which is also that of report.json:
# 1: first.
# 2: distances in l1 and l0; the nearest adversarials of attacks on the least distance; components of ensembles.
# 3: how far each clean verdict is certified.
SCHEMA_VERSION = 3

SAMPLE_COLUMNS = (
    "sample_id", "label", "clean_pred", "clean_confidence", "attack", "norm", "eps", "success", "robust",
    "adv_pred", "adv_confidence", "distance_linf", "distance_l2", "robust_8bit", "forwards", "gradients",
    "restart", "distance_l1", "distance_l0",
)  # fmt: skip

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE clean (
    position INTEGER PRIMARY KEY, sample_id TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL,
    label INTEGER NOT NULL, clean_pred INTEGER NOT NULL, clean_confidence REAL NOT NULL, certified INTEGER NOT NULL
);
CREATE TABLE result (
    position INTEGER NOT NULL, attack TEXT NOT NULL, eps REAL NOT NULL, success INTEGER NOT NULL,
    success_8bit INTEGER NOT NULL, adv_pred INTEGER, adv_confidence REAL, distance_linf REAL,
    distance_l2 REAL, distance_l1 REAL, distance_l0 REAL, forwards INTEGER NOT NULL, gradients INTEGER NOT NULL,
    restart INTEGER,
    PRIMARY KEY (position, attack, eps)
) WITHOUT ROWID;
CREATE TABLE unit (
    start INTEGER NOT NULL, attack TEXT NOT NULL, seconds REAL NOT NULL, refuted INTEGER NOT NULL,
    overlooked INTEGER NOT NULL, PRIMARY KEY (start, attack)
) WITHOUT ROWID;
CREATE TABLE nearest (
    position INTEGER NOT NULL, attack TEXT NOT NULL, distance REAL NOT NULL, PRIMARY KEY (position, attack)
) WITHOUT ROWID;
CREATE TABLE component (
    start INTEGER NOT NULL, attack TEXT NOT NULL, component TEXT NOT NULL, broken INTEGER NOT NULL,
    PRIMARY KEY (start, attack, component)
) WITHOUT ROWID;
CREATE TABLE picture (
    role TEXT NOT NULL, rank REAL NOT NULL, position INTEGER NOT NULL, attack TEXT NOT NULL, eps REAL NOT NULL,
    adv_pred INTEGER NOT NULL, adv_confidence REAL NOT NULL, distance REAL NOT NULL, distance_linf REAL NOT NULL,
    distance_l2 REAL NOT NULL, shape TEXT NOT NULL, x BLOB NOT NULL, x_adv BLOB NOT NULL,
    PRIMARY KEY (role, attack, position)
) WITHOUT ROWID;
CREATE TABLE adversarial (
    position INTEGER NOT NULL, attack TEXT NOT NULL, shape TEXT NOT NULL, x BLOB NOT NULL, x_adv BLOB NOT NULL,
    PRIMARY KEY (position, attack)
) WITHOUT ROWID;
CREATE TABLE finding (name TEXT PRIMARY KEY, level TEXT NOT NULL, message TEXT NOT NULL);
"""


class Busy(InputError):
    """Another process has written what this one was about to."""


@dataclass(frozen=True)
class Clean:
    """What the model says of one unchanged sample."""

    position: int  # rank in the data set, from 0
    sample_id: str
    sha256: str
    label: int
    clean_pred: int
    clean_confidence: float
    certified: int = 0  # of the run's eps, smallest first, within how many it is proved that no adversarial exists


@dataclass(frozen=True)
class Result:
    """The verified verdict on one (sample, attack, eps). What describes an adversarial is None without one."""

    position: int
    attack: str
    eps: float
    success: bool
    success_8bit: bool
    adv_pred: int | None
    adv_confidence: float | None
    distance_linf: float | None
    distance_l2: float | None
    distance_l1: float | None
    distance_l0: float | None
    forwards: int
    gradients: int
    restart: int | None


@dataclass(frozen=True)
class Picture:
    """One attacked sample kept for the report: `role` says why, the lowest `rank` in each role stays."""

    role: str  # "smallest" | "typical" | "confident" | "withstood"
    rank: float
    position: int
    attack: str
    eps: float
    adv_pred: int
    adv_confidence: float
    distance: float  # in the run's norm
    distance_linf: float
    distance_l2: float
    x: np.ndarray  # (C, H, W) float32 in [0, 1]
    x_adv: np.ndarray  # (C, H, W) float32 in [0, 1]


@dataclass(frozen=True)
class Finding:
    """One reason to believe the run, or not to. `name` is unique in a run."""

    name: str
    level: str  # "pass" | "warn" | "fail"
    message: str

    @classmethod
    def check(cls, name: str, good: bool, passed: str, failed: str, level: str = "warn") -> "Finding":
        """A pass with the one message or, where something is not as it should be, `level` with the other."""
        return cls(name, "pass", passed) if good else cls(name, level, failed)


PICTURES_KEPT = {"smallest": 3, "typical": 8, "confident": 3, "withstood": 3}


class Store:
    """A run, on disk or (path None) in memory. Open one with `Store.create` or `Store.open`.

    `identity` is what a resumed run must share: {"model": {...}, "data": {...}, "options": {...}}, with the
    attack names in order under options.attacks and the norm under options.norm. `details` is what may change:
    the command, the environment, the class names.
    """

    def __init__(self, path: Path | None):
        self._path = path
        # A run made in one thread may be read in another; SQLite itself takes turns.
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row

    @classmethod
    def create(cls, path: Path | None, identity: Mapping[str, Any], details: Mapping[str, Any]) -> "Store":
        """Start an empty run at `path`. InputError where a run is already there, or nothing can be written."""
        require_no_run(path)
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            store = cls(path)
            # In one transaction: a process killed here leaves a blank file, which is no run.
            with store._transaction():
                for statement in _TABLES.split(";"):
                    store._db.execute(statement)
                store._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                store._put(identity=identity, **details)
        except (OSError, sqlite3.OperationalError) as error:
            if disk_is_full(error):
                raise
            folder = path.parent if path else "memory"
            raise InputError(f"cannot write a run to {folder} ({error}); name another --output") from None
        return store

    @classmethod
    def open(cls, path: Path, to_resume: bool = False) -> "Store":
        """Open the run at `path` (the file or its folder). InputError where there is none that can be read.

        With `to_resume` every page is looked at, so that hours later no damaged one is come upon.
        """
        advice = "name another --output" if to_resume else "make the run anew"
        path = path / FILENAME if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"no run at {path}")
        with ExitStack() as on_failure:
            try:
                store = on_failure.enter_context(closing(cls(path)))
                version = store._db.execute("PRAGMA user_version").fetchone()[0]
                if version in (0, SCHEMA_VERSION):  # 0: of no run, or of one that lost its beginning
                    store._require_sound(to_resume)
            except (sqlite3.DatabaseError, KeyError, TypeError, ValueError) as error:
                if is_locked(error):
                    raise Busy(f"{path}: {BUSY}") from None
                raise InputError(f"{path} is damaged, or no run's store ({visible(str(error))}): {advice}") from None
            if version != SCHEMA_VERSION:
                raise InputError(
                    f"{path} has schema version {version}, and this version of robust reads {SCHEMA_VERSION}: use the "
                    f"version that wrote it, or {advice}"
                )
            on_failure.pop_all()
        return store

    def close(self) -> None:
        self._db.close()

    def close_and_discard_if_empty(self) -> None:
        """Close, and remove a run in which no unit has been done, with the folder if that is empty."""
        empty = not self.seconds()
        self.close()
        if empty and self._path is not None:
            self._path.unlink()
            with suppress(OSError):  # other files are there
                self._path.parent.rmdir()

    def copy_to(self, path: Path) -> None:
        """Write the whole run to `path`, unless it lives there. InputError where another run does, or nothing can be
        written."""
        if self._path is not None and path.exists() and path.samefile(self._path):
            return
        require_no_run(path, "name another folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path)) as target:
                self._db.backup(target)
        except (OSError, sqlite3.OperationalError) as error:
            if disk_is_full(error):
                raise
            raise InputError(f"cannot write a run to {path.parent} ({error}); name another folder") from None

    # Writing

    def set(self, **details: Any) -> None:
        """Record run-wide facts, such as command="..."; they are read back from `details`."""
        with self._transaction():
            self._put(**details)

    def add_clean(self, rows: Iterable[Clean], **details: Any) -> None:
        """Record clean verdicts, and with them, as `set` does, run-wide facts."""
        with self._transaction():
            self._insert("clean", rows)
            self._put(**details)

    def add_unit(
        self,
        start: int,
        attack: str,
        seconds: float,
        results: Iterable[Result],
        pictures: Iterable[Picture] = (),
        adversarials: Iterable[tuple[int, np.ndarray, np.ndarray]] = (),
        nearest: Iterable[tuple[int, float]] = (),
        components: Mapping[str, int] | None = None,
        refuted: int = 0,
        overlooked: int = 0,
    ) -> None:
        """Record the window that begins at position `start` as attacked, all of it or (on an error) nothing.

        `adversarials` are (position, x, x_adv); `nearest` (position, distance) of the nearest adversarial that an
        attack on the least distance found; `components` how many samples each part of an ensemble broke. `refuted`
        counts the successes claimed on the fast twin that the model itself did not confirm; `overlooked` the
        successes only the model itself saw.
        """
        with self._transaction():
            self._insert("result", results)
            for picture in _best(pictures):
                self._add_picture(picture)
            self._db.executemany(
                "INSERT INTO adversarial VALUES (?, ?, ?, ?, ?)",
                ((position, attack, _shape(x), _pack(x), _pack(x_adv)) for position, x, x_adv in adversarials),
            )
            self._db.executemany(
                "INSERT INTO nearest VALUES (?, ?, ?)",
                ((position, attack, distance) for position, distance in nearest),
            )
            self._db.executemany(
                "INSERT INTO component VALUES (?, ?, ?, ?)",
                ((start, attack, name, broken) for name, broken in (components or {}).items()),
            )
            self._db.execute("INSERT INTO unit VALUES (?, ?, ?, ?, ?)", (start, attack, seconds, refuted, overlooked))

    def drop_attack(self, attack: str) -> None:
        """Forget everything about an attack that could not be finished."""
        with self._transaction():
            for table in ("result", "unit", "picture", "adversarial", "nearest", "component"):
                self._db.execute(f"DELETE FROM {table} WHERE attack = ?", (attack,))

    def set_findings(self, findings: Iterable[Finding]) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM finding")
            self._insert("finding", findings)

    # Reading

    @property
    def identity(self) -> dict[str, Any]:
        return self._get("identity")

    @property
    def details(self) -> dict[str, Any]:
        rows = self._db.execute("SELECT key, value FROM meta WHERE key != 'identity'")
        return {row["key"]: json.loads(row["value"]) for row in rows}

    def size(self) -> int:
        """How many samples have their clean verdict."""
        return self._db.execute("SELECT count(*) FROM clean").fetchone()[0]

    def clean(self, start: int = 0, count: int = -1) -> list[Clean]:
        """The clean verdicts in data order, from position `start`."""
        rows = self._db.execute("SELECT * FROM clean WHERE position >= ? ORDER BY position LIMIT ?", (start, count))
        return [Clean(**row) for row in rows]

    def done(self, start: int, attack: str) -> bool:
        """Whether the window that begins at `start` has been attacked with `attack`."""
        query = "SELECT 1 FROM unit WHERE start = ? AND attack = ?"
        return self._db.execute(query, (start, attack)).fetchone() is not None

    def standing(self, start: int, count: int, attack: str) -> int:
        """How many of `count` samples from `start` are right and withstood `attack` at the largest eps."""
        query = """
            SELECT count(*) FROM result JOIN clean USING (position)
            WHERE position >= ? AND position < ? AND attack = ? AND clean_pred = label AND NOT success
                AND eps = (SELECT max(eps) FROM result)
        """
        return self._db.execute(query, (start, start + count, attack)).fetchone()[0]

    def certified(self) -> list[int]:
        """For each eps, smallest first, on how many samples it is proved that no adversarial exists."""
        query = "SELECT count(*) FROM clean WHERE certified > ?"
        return [self._db.execute(query, (k,)).fetchone()[0] for k in range(len(self.identity["options"]["eps"]))]

    def successes(self) -> tuple[list[tuple[str, float]], np.ndarray]:
        """The (attack, eps) of the run, and for each sample in data order whether each broke it, as one long array.

        As a DataFrame half a million verdicts take seconds, and the gate is to answer at once.
        """
        keys = self._db.execute(
            "SELECT attack, eps FROM result WHERE position = (SELECT min(position) FROM result) ORDER BY attack, eps"
        ).fetchall()
        found = self._db.execute(
            "SELECT group_concat(success, '') FROM (SELECT success FROM result ORDER BY position, attack, eps)"
        ).fetchone()[0]
        return [tuple(key) for key in keys], np.frombuffer((found or "").encode(), np.uint8) == ord("1")

    def samples(self, eps: float | None = None, position: int | None = None) -> pd.DataFrame:
        """One row a (sample, attack, eps), `SAMPLE_COLUMNS`, in the order of data, attacks and eps; at one eps, or of
        one sample, where it is given."""
        return pd.concat(self.sample_chunks(eps=eps, position=position), ignore_index=True)

    def sample_chunks(
        self, rows: int = 10_000, eps: float | None = None, position: int | None = None
    ) -> Iterator[pd.DataFrame]:
        """`samples` in pieces, for tables that should not be held in memory whole."""
        options = self.identity["options"]
        given = {"eps": eps, "position": position}
        chosen = {name: value for name, value in given.items() if value is not None}
        condition = " AND ".join(f"{name} = ?" for name in chosen) or "1"
        query = f"""
            SELECT sample_id, label, clean_pred, clean_confidence, attack, ? AS norm, eps, success,
                   clean_pred = label AND NOT success AS robust, adv_pred, adv_confidence, distance_linf,
                   distance_l2, clean_pred = label AND NOT success_8bit AS robust_8bit, forwards, gradients,
                   restart, distance_l1, distance_l0
            FROM result JOIN clean USING (position) WHERE {condition} ORDER BY position, {self._rank()}, eps
        """
        return pd.read_sql_query(
            query,
            self._db,
            params=[options["norm"], *chosen.values(), *options["attacks"]],
            chunksize=rows,
            dtype={
                "success": bool, "robust": bool, "robust_8bit": bool, "adv_pred": "Int64", "restart": "Int64",
                "adv_confidence": float, "distance_linf": float, "distance_l2": float, "distance_l1": float,
                "distance_l0": float,
            },
        )  # fmt: skip

    def summary(self) -> pd.DataFrame:
        """One row an (attack, eps) and one a (worst_case, eps), `SUMMARY_COLUMNS`, in the order of attacks and eps.

        Accuracies are over all samples: one that is wrong on the clean image is not robust. The worst case is taken per
        sample over the attacks (neither the mean nor the minimum of their accuracies; auto-attack#45).
        `median_distance` is that of the adversarial examples found, in the run's norm. `seconds` gives each attack's
        wall-clock time; a ladder of eps is one run, so its time is shared out by the evaluations made.

        Computed by the database: of the verdicts on 50,000 images, a DataFrame takes half a gigabyte.
        """
        options, seconds = self.identity["options"], self.seconds()
        columns = """
            eps, count(*) AS n, avg(clean_pred = label) AS clean_accuracy,
            sum(clean_pred = label AND NOT success) AS stand,
            avg(clean_pred = label AND NOT success) AS robust_accuracy,
            avg(clean_pred = label AND NOT success_8bit) AS robust_accuracy_8bit,
            sum(forwards) AS forwards, sum(gradients) AS gradients
        """
        of_attacks = f"""
            SELECT attack, {columns} FROM result JOIN clean USING (position)
            GROUP BY attack, eps ORDER BY {self._rank()}, eps
        """
        worst = f"""
            SELECT '{WORST_CASE}' AS attack, {columns} FROM (
                SELECT position, eps, max(success) AS success, max(success_8bit) AS success_8bit,
                       sum(forwards) AS forwards, sum(gradients) AS gradients
                FROM result GROUP BY position, eps
            ) JOIN clean USING (position) GROUP BY eps ORDER BY eps
        """
        rows = list(map(dict, self._db.execute(of_attacks, options["attacks"])))
        evaluations: Counter[str] = Counter()
        for row in rows:
            evaluations[row["attack"]] += row["forwards"] + row["gradients"]
        at: defaultdict[float, float] = defaultdict(float)  # eps -> seconds
        for row in rows:
            share = (row["forwards"] + row["gradients"]) / max(1, evaluations[row["attack"]])
            row["seconds"] = seconds.get(row["attack"], 0.0) * share
            at[row["eps"]] += row["seconds"]
        rows += [dict(row) | {"seconds": at[row["eps"]]} for row in self._db.execute(worst)]
        for row in rows:
            found = self.distances(row["eps"], options["norm"], None if row["attack"] == WORST_CASE else row["attack"])
            ci_low, ci_high = wilson(row["stand"], row["n"])
            row |= {"norm": options["norm"], "ci_low": ci_low, "ci_high": ci_high}
            row["median_distance"] = float(np.median(found)) if len(found) else math.nan
        return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))

    def distances(self, eps: float, norm: str, attack: str | None = None) -> np.ndarray:
        """In `norm` the distances of the adversarials within eps that the attack found, or of each sample's nearest."""
        query = f"""
            SELECT min(distance_{norm}) FROM result WHERE success AND eps = ? AND (? IS NULL OR attack = ?)
            GROUP BY position
        """
        return np.fromiter((row[0] for row in self._db.execute(query, (eps, attack, attack))), float)

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds spent in each attack, its re-verification included."""
        return dict(map(tuple, self._db.execute("SELECT attack, sum(seconds) FROM unit GROUP BY attack").fetchall()))

    def twin_disagreements(self) -> tuple[int, int]:
        """How many verdicts of the fast twin the model overturned: (refuted, overlooked)."""
        row = self._db.execute("SELECT total(refuted), total(overlooked) FROM unit").fetchone()
        return int(row[0]), int(row[1])

    def nearest(self, attack: str) -> dict[int, float]:
        """Position -> distance of the nearest adversarial that `attack` found, if it looks for the least distance."""
        rows = self._db.execute("SELECT position, distance FROM nearest WHERE attack = ? ORDER BY position", (attack,))
        return dict(map(tuple, rows))

    def components(self, attack: str) -> dict[str, int]:
        """Component -> how many samples it broke, of an attack that is an ensemble."""
        query = "SELECT component, sum(broken) FROM component WHERE attack = ? GROUP BY component"
        return dict(map(tuple, self._db.execute(query, (attack,))))

    def pictures(self) -> list[Picture]:
        """The attacked samples kept for the report, best first in each role."""
        rows = self._db.execute("SELECT * FROM picture ORDER BY attack, role, rank, position")
        return [_picture(row) for row in rows]

    def adversarials(self) -> Iterator[tuple[Clean, str, float, np.ndarray, np.ndarray]]:
        """(clean, attack, eps, x, x_adv) of the verified successes, if the run saved them; eps is the smallest of the
        run's at which the sample broke."""
        rows = self._db.execute(
            "SELECT clean.*, attack, shape, x, x_adv, (SELECT MIN(eps) FROM result WHERE success AND "
            "(result.position, result.attack) = (adversarial.position, adversarial.attack)) AS eps "
            "FROM adversarial JOIN clean USING (position) ORDER BY position, attack"
        )
        for row in rows:
            clean = Clean(**{field.name: row[field.name] for field in fields(Clean)})
            x, x_adv = (_unpack(row[name], row["shape"]) for name in ("x", "x_adv"))
            yield clean, row["attack"], row["eps"], x, x_adv

    def findings(self) -> list[Finding]:
        return [Finding(**row) for row in self._db.execute("SELECT * FROM finding ORDER BY rowid")]

    # Inside

    def _require_sound(self, every_page: bool) -> None:
        """ValueError, or whatever reading it raises, where a run's tables or what all its readers need is not there."""
        tables = {row["name"] for row in self._db.execute("SELECT name FROM sqlite_master")}
        if lost := [name for name in re.findall(r"CREATE TABLE (\w+)", _TABLES) if name not in tables]:
            raise ValueError(f"it has no table {lost[0]}")
        if not isinstance(self.identity["options"], dict) or not isinstance(self.details, dict):
            raise ValueError("it does not say what was run")
        if every_page and (fault := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise ValueError(fault.splitlines()[-1])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            # A full disk may have rolled the transaction back already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.IntegrityError):  # these rows were not there when this process looked
                raise Busy(BUSY) from None
            raise

    def _put(self, **values: Any) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            ((key, json.dumps(value)) for key, value in values.items()),
        )

    def _get(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise ValueError(f"it has no {key}")
        return json.loads(row["value"])

    def _insert(self, table: str, rows: Iterable[Any]) -> None:
        rows = list(rows)
        if rows:
            names = [field.name for field in fields(rows[0])]
            self._db.executemany(
                f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
                map(attrgetter(*names), rows),
            )

    def _add_picture(self, picture: Picture) -> None:
        """Keep the picture if it is among the first of its role, and drop the one it displaces."""
        rivals = self._db.execute(
            "SELECT rank, position FROM picture WHERE role = ? AND attack = ? ORDER BY rank, position",
            (picture.role, picture.attack),
        ).fetchall()
        if len(rivals) >= PICTURES_KEPT[picture.role]:
            last = rivals[-1]
            if (picture.rank, picture.position) > (last["rank"], last["position"]):
                return
            self._db.execute(
                "DELETE FROM picture WHERE role = ? AND attack = ? AND position = ?",
                (picture.role, picture.attack, last["position"]),
            )
        values = {field.name: getattr(picture, field.name) for field in fields(Picture)}
        values |= {"shape": _shape(picture.x), "x": _pack(picture.x), "x_adv": _pack(picture.x_adv)}
        names = ", ".join(values)
        self._db.execute(
            f"INSERT INTO picture ({names}) VALUES ({', '.join('?' * len(values))})", list(values.values())
        )

    def _rank(self) -> str:
        """SQL for the rank of an attack among those of the run, which are to be its parameters."""
        ranks = " ".join(f"WHEN ? THEN {rank}" for rank in range(len(self.identity["options"]["attacks"])))
        return f"CASE attack {ranks} END"


def _best(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Those that can be among the first of their role: most are not, and need no look into the database."""
    offered = list(pictures)
    for role, kept in PICTURES_KEPT.items():
        of_role = (picture for picture in offered if picture.role == role)
        yield from nsmallest(kept, of_role, key=lambda picture: (picture.rank, picture.position))


def _shape(x: np.ndarray) -> str:
    return json.dumps(x.shape)


def _pack(x: np.ndarray) -> bytes:
    return zlib.compress(np.ascontiguousarray(x, np.float32).tobytes(), level=1)


def _unpack(blob: bytes, shape: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(blob), np.float32).reshape(json.loads(shape))


def _picture(row: sqlite3.Row) -> Picture:
    values = {key: row[key] for key in row.keys()}
    shape = values.pop("shape")
    values |= {"x": _unpack(row["x"], shape), "x_adv": _unpack(row["x_adv"], shape)}
    return Picture(**values)


def holds_run(path: Path) -> bool:
    """Whether there is a run at `path`, or anything else than the blank file of one that never began."""
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=0)) as database:  # what is locked is a run
            return database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
    except sqlite3.DatabaseError:
        return True


def require_no_run(path: Path | None, advice: str = "continue it with --resume, or name another --output") -> None:
    """InputError, which ends in the advice, where `path` holds a run already."""
    if path is not None and holds_run(path):
        raise InputError(f"{path.parent} already holds a run: {advice}")


def require_no_files(folder: Path, names: Iterable[str]) -> None:
    """InputError where one of these files, that a run is about to write, is in the folder, and no run beside it."""
    if not holds_run(folder / FILENAME):
        for name in names:
            if (folder / name).exists():
                raise InputError(f"{folder / name} is there already, and belongs to no run: name another --output")


def is_locked(error: Exception) -> bool:
    """Whether another process holds the store."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def disk_is_full(error: Exception) -> bool:
    return "disk is full" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> Sequence[str]:
    """What differs between two identities, a phrase each: 'options eps (0.03 there, 0.05 here)'.

    An option that a run lacks, as the option is younger, has its default there.
    """
    found = []
    for section in sorted({*stored, *current}):
        defaults = _DEFAULTS if section == "options" else {}
        there, here = ({**defaults, **identity.get(section, {})} for identity in (stored, current))
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                found.append(f"{section} {key} ({there.get(key)} there, {here.get(key)} here)")
    return found
