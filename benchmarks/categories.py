"""Which guards were written for which kind of trap."""

# By the name of the category, lower case; of the pairs of "gated_finance", which have many, by that of their source.
CATEGORY_GUARDS = {
    "number": "number quantity", "unit": "quantity number", "date": "number exclusive quantity",
    "number_date": "number quantity exclusive", "version": "number identifier", "identifier": "identifier number",
    "id_swap": "identifier number", "negation": "negation antonym", "antonym": "antonym negation",
    "action": "antonym exclusive", "quantifier": "exclusive antonym number", "comparative": "antonym order",
    "wh": "question_word", "question_type": "question_word", "attribute": "question_word",
    "entity": "entity exclusive", "entity_swap": "entity exclusive", "principal_swap": "exclusive entity",
    "product_swap": "exclusive entity", "tier_swap": "exclusive entity", "direction": "direction order",
    "scope": "restriction exclusive", "substitution": "substitution", "answer_shape": "shape number language",
    "gated_finance": "antonym exclusive direction",
}  # fmt: skip


def kind_of(category: str, source: str) -> str:
    """Return a pair's kind: its category, coarse enough to count."""
    return source if source == "gated_finance" else category.partition("/")[0]


def guards_of(kind: str) -> frozenset[str]:
    """Return the guards that were written for a kind of trap; none for one that nobody wrote a guard for."""
    return frozenset(CATEGORY_GUARDS.get(kind.lower(), "").split())
