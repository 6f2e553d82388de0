"""Row selection by an expression such as  next_token == '1' and record.correct and not early.

A small grammar, parsed by lark and evaluated on whole columns with numpy. Text is compared once per distinct token.
Nothing in an expression is executed.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import lark
import numpy as np

from nla_engine.errors import FieldError, RecordFieldError, WhereError, WhereRecordError
from nla_engine.options import regular_expression
from nla_engine.store.reader import StoreReader
from nla_engine.store.views.fields import MISSING, Labels, field_names, row_field

GRAMMAR = r"""
?start: either
?either: both ("or" both)*
?both: negation ("and" negation)*
?negation: "not" negation -> negated
    | condition
?condition: operand
    | operand COMPARE operand -> compared
    | operand "matches" operand -> matched
    | operand "in" list -> listed
?operand: FIELD -> field
    | literal
    | "(" either ")"
list: "[" [literal ("," literal)*] "]"
literal: NUMBER | TEXT | TRUTH

COMPARE: "==" | "!=" | "<=" | ">=" | "<" | ">"
TRUTH.2: /(true|false)\b/
FIELD: /[A-Za-z_]\w*(\.[\w-]+)*/
NUMBER: /[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?/
TEXT: /'[^']*'|"[^"]*"/
%ignore /\s+/
"""

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


def select_rows(store: StoreReader, expression: str, first: int = 0) -> np.ndarray:
    """int64, ascending: the rows from `first` on for which the expression holds. Rows before `first` are not read.

    Raises WhereError, with the place in the expression and the known fields. A field that no prompt record has is an
    error only with first = 0: otherwise the records before may have it.
    """
    return _Selection(store, expression, first).rows()


Operand = np.ndarray | Labels | int | float | str | bool


class _Selection:
    """One evaluation of one expression over one store, from row `first` on."""

    def __init__(self, store: StoreReader, expression: str, first: int) -> None:
        self._store = store
        self._expression = expression
        self._first = first

    def rows(self) -> np.ndarray:
        try:
            tree = _parser().parse(self._expression)
        except lark.exceptions.UnexpectedInput as error:
            at_end = isinstance(error, lark.exceptions.UnexpectedEOF) or (
                isinstance(error, lark.exceptions.UnexpectedToken) and error.token.type == "$END"
            )
            place = len(self._expression) if at_end else (error.pos_in_stream or 0)
            raise self._error("it ends too early" if at_end else "this cannot be understood", place) from None
        try:
            return np.flatnonzero(self._truth(tree)) + self._first
        except RecursionError:
            raise self._error("it is nested too deeply", 0) from None

    def _truth(self, node: lark.Tree) -> np.ndarray:
        """The condition at `node`, bool [rows]."""
        if node.data == "either":
            return np.logical_or.reduce([self._truth(child) for child in _trees(node)])
        if node.data == "both":
            return np.logical_and.reduce([self._truth(child) for child in _trees(node)])
        if node.data == "negated":
            return ~self._truth(_trees(node)[0])
        if node.data == "compared":
            return self._compared(node)
        if node.data == "matched":
            return self._matched(node)
        if node.data == "listed":
            return self._listed(node)
        value = self._operand(node)
        if isinstance(value, Labels) and value.kind == "record":
            return self._per_record(node, value, bool, lambda found: found)
        if isinstance(value, np.ndarray) and value.dtype == bool:
            return value
        raise self._error(f"{_kind(value)} is not a condition: compare it with something", node)

    def _operand(self, node: lark.Tree) -> Operand:
        if node.data == "field":
            return self._field(str(node.children[0]), node)
        if node.data == "literal":
            return self._literal(node)
        return self._truth(node)

    def _field(self, name: str, node: lark.Tree) -> Operand:
        try:
            return row_field(self._store, name, self._first)
        except FieldError as error:
            kind = WhereRecordError if isinstance(error, RecordFieldError) else WhereError
            raise self._error(str(error), node, kind) from None

    def _compared(self, node: lark.Tree) -> np.ndarray:
        left_node, sign, right_node = node.children
        assert isinstance(left_node, lark.Tree)
        assert isinstance(right_node, lark.Tree)
        left, right, name = self._operand(left_node), self._operand(right_node), str(sign)
        if not isinstance(left, np.ndarray | Labels):
            if not isinstance(right, np.ndarray | Labels):
                raise self._error("two constants are compared: name a field", node)
            left, right, name = right, left, MIRRORED[name]
        if name not in ("==", "!=") and "number" not in (_kind(left), _kind(right)):
            raise self._error(f"{_kind(left)} has no order: use == != in matches", node)
        if isinstance(left, Labels):
            if isinstance(right, np.ndarray | Labels):
                raise self._error(f"{_kind(left)} can only be compared with a constant", right_node)
            return self._compare_labels(node, left, right, COMPARISONS[name])
        if _kind(left) != _kind(right):
            raise self._error(f"{_kind(left)} is compared with {_kind(right)}", node)
        return _compare(left, right, COMPARISONS[name])

    def _compare_labels(
        self, node: lark.Tree, labels: Labels, constant: Operand, compare: Callable[[Any, Any], Any]
    ) -> np.ndarray:
        if labels.kind == "record":
            return self._per_record(node, labels, type(constant), lambda found: compare(found, constant))
        if not isinstance(constant, str):
            raise self._error(f"text is compared with {_kind(constant)}", node)
        return _spread(labels, [compare(text, constant) for text in labels.values])

    def _matched(self, node: lark.Tree) -> np.ndarray:
        target, pattern_node = _trees(node)
        labels, pattern = self._operand(target), self._operand(pattern_node)
        if not isinstance(labels, Labels):
            raise self._error(f"'matches' needs a text, this is {_kind(labels)}", target)
        if not isinstance(pattern, str):
            raise self._error("'matches' needs a quoted pattern", pattern_node)
        try:
            search = regular_expression(pattern).search
        except ValueError as error:
            raise self._error(f"the pattern is not a regular expression: {error}", pattern_node) from None
        if labels.kind == "record":
            return self._per_record(node, labels, str, lambda found: search(found) is not None)
        return _spread(labels, [search(text) is not None for text in labels.values])

    def _listed(self, node: lark.Tree) -> np.ndarray:
        target, list_node = _trees(node)
        value = self._operand(target)
        if not isinstance(value, np.ndarray | Labels):
            raise self._error("'in' needs a field before it", target)
        result = np.zeros(self._store.rows - self._first, bool)
        for item in (child for child in list_node.children if isinstance(child, lark.Tree)):
            constant = self._literal(item)
            if isinstance(value, Labels):
                result |= self._compare_labels(item, value, constant, operator.eq)
            elif _kind(value) == _kind(constant):
                result |= _compare(value, constant, operator.eq)
            else:
                raise self._error(f"{_kind(value)} is compared with {_kind(constant)}", item)
        return result

    def _per_record(
        self, node: lark.Tree, labels: Labels, kind: type, holds: Callable[[Any], Any]
    ) -> np.ndarray:
        """Apply `holds` to record values of a type. It is false for records without the field or with null."""
        fits = [_is(value, kind) for value in labels.values]
        present = [value for value in labels.values if value is not MISSING and value is not None]
        if present and not self._first and not any(fits):
            shown = json.dumps(present[0])[:40]
            raise self._error(
                f"the field is never {_NAMES[kind]} in the prompt records (it is, for example, {shown})",
                node,
                WhereRecordError,
            )
        return _spread(
            labels, [fit and bool(holds(value)) for fit, value in zip(fits, labels.values, strict=True)]
        )

    def _literal(self, node: lark.Tree) -> int | float | str | bool:
        """A constant. A number without point and exponent is an integer, exact however long."""
        token = node.children[0]
        assert isinstance(token, lark.Token)
        if token.type == "NUMBER":
            try:
                return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)
            except ValueError:
                raise self._error("a number of so many digits cannot be read", node) from None
        return token == "true" if token.type == "TRUTH" else str(token[1:-1])

    def _error(self, message: str, place: lark.Tree | int, kind: type[WhereError] = WhereError) -> WhereError:
        start = place if isinstance(place, int) else place.meta.start_pos
        fields = ", ".join(field_names(self._store))
        return kind(
            f"where expression, column {start + 1}: {message}: {self._expression[start : start + 40]!r} "
            f"(fields: {fields}, record.KEY)"
        )


_NAMES: dict[type, str] = {int: "a number", float: "a number", str: "text", bool: "true or false"}


@cache
def _parser() -> lark.Lark:
    return lark.Lark(GRAMMAR, parser="lalr", propagate_positions=True)


def _trees(node: lark.Tree) -> list[lark.Tree]:
    return [child for child in node.children if isinstance(child, lark.Tree)]


def _compare(left: Any, right: Any, compare: Callable[[Any, Any], Any]) -> np.ndarray:
    """Compare a column with another or with a constant. Integers are compared exactly, however large."""
    if isinstance(right, int) and not isinstance(right, bool):
        if left.dtype.kind == "f":
            largest = int(np.finfo(np.float64).max)
            right = np.float64(right) if abs(right) <= largest else math.inf if right > 0 else -math.inf
        elif not -(1 << 63) <= right < 1 << 63:
            return np.full(len(left), bool(compare(0, right)))
        else:
            left = left.astype(np.int64)
    result: np.ndarray = compare(left, right)
    return result


def _is(value: Any, kind: type) -> bool:
    """Whether a prompt record's `value` has the type of a literal."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool)
        if kind in (int, float)
        else isinstance(value, kind)
    )


def _kind(value: Operand) -> str:
    if isinstance(value, Labels):
        return "text" if value.kind == "text" else "a record field"
    if isinstance(value, str):
        return "text"
    is_truth = value.dtype == bool if isinstance(value, np.ndarray) else isinstance(value, bool)
    return "true or false" if is_truth else "number"


def _spread(labels: Labels, truths: Sequence[bool]) -> np.ndarray:
    return np.asarray(truths, bool)[labels.index]
