"""Rows of pages: what was appended stands in order, a cleared row is empty, and tables are as wide as needed."""

from types import SimpleNamespace

import numpy as np

from cutp.engine.block_tables import BlockTables


def table(tables, *slots):
    return tables.lookup_table([SimpleNamespace(slot=slot) for slot in slots])


def test_rows_grow_change_and_end():
    tables = BlockTables(3, 6)
    tables.append(2, [7, 5])
    tables.append(0, [4])
    tables.append(2, [9])
    assert table(tables, 2, 0).tolist() == [[7, 5, 9], [4, 0, 0]] and table(tables, 0, 1).tolist() == [[4], [0]]
    tables.replace(2, 1, 8)
    assert table(tables, 2).tolist() == [[7, 8, 9]]
    tables.clear(2)
    assert table(tables, 2, 0).tolist() == [[0], [4]]
    tables.append(2, [1])
    tables.append(2, [])
    assert table(tables, 2, 0).tolist() == [[1], [4]]
    assert tables.array.tolist() == [[4] + [0] * 5, [0] * 6, [1] + [0] * 5]


def test_a_full_row():
    tables = BlockTables(1, 3)
    tables.append(0, [3, 2, 1])
    assert table(tables, 0).tolist() == [[3, 2, 1]]


def test_a_table_is_a_copy_of_int32():
    tables = BlockTables(2, 3)
    tables.append(0, [3])
    made = table(tables, 0, 1)
    tables.append(0, [4])
    assert made.tolist() == [[3], [0]] and made.dtype == np.int32


def test_no_requests():
    assert table(BlockTables(2, 3)).shape == (0, 0)
