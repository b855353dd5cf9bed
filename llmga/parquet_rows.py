"""Manifest rows as a Parquet table: texts as columns, turns as a list of structs, `meta` as JSON text."""

import json
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 4096


class ParquetError(ValueError):
    """A file that is not a Parquet table of manifest rows."""


def read(path: Path, known: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a table in order, without the fields that are null; the file is memory-mapped and read in batches.

    Args:
        path: the Parquet file.
        known: the columns it may have.
    Raises:
        ParquetError: the file is not Parquet or cut short, a column is unknown, or `meta` is not JSON.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as problem:
        raise ParquetError(f"{path} is not a whole Parquet file, fetch or write it again: {problem}") from None
    for name in table.schema_arrow.names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)};"
            raise ParquetError(f"{path} has the unknown column {name!r}; {hint} what else there is goes into 'meta'")
    index = 0
    try:
        for batch in table.iter_batches(_BATCH_ROWS):
            for row in batch.to_pylist():
                row = {name: value for name, value in row.items() if value is not None}
                if isinstance(row.get("meta"), str):
                    row["meta"] = json.loads(row["meta"])
                yield row
                index += 1
    except json.JSONDecodeError as problem:
        raise ParquetError(f"{path}[{index}]: 'meta' must be JSON text: {problem}") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
        raise ParquetError(f"{path} cannot be decoded past row {index}, fetch or write it again: {problem}") from None


def write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows that are known to be valid; returns their number."""
    import pyarrow
    import pyarrow.parquet

    schema, count, rest = _schema(), 0, iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(rest, _BATCH_ROWS)):
            packed = [
                {**row, "meta": json.dumps(row["meta"], ensure_ascii=False)} if "meta" in row else row for row in batch
            ]
            writer.write_table(pyarrow.Table.from_pylist(packed, schema=schema))
            count += len(batch)
    return count


def _schema() -> "pyarrow.Schema":
    import pyarrow

    text = pyarrow.string()
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    columns = (
        "id task image mask short_caption caption instruction target_caption messages prompt source licence split meta"
    )
    return pyarrow.schema([(name, turns if name == "messages" else text) for name in columns.split()])
