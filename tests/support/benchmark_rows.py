"""Made-up rows with the field names of the benchmarks' published files, and the answers in them."""

from typing import Any

GSM8K = {
    "question": "A shelf holds 3 rows of 14 books. How many books is that?",
    "answer": "Each row has 14 books.\n3 rows have 3*14=<<3*14=42>>42 books.\n#### 1,042",
}
MATH500 = {
    "problem": "Simplify $\\frac{6}{8}$.",
    "solution": "Divide both by 2: $\\boxed{\\frac{3}{4}}$.",
    "answer": "\\frac{3}{4}",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}
AIME_WITH_SOLUTION = {
    "id": 60,
    "problem": "How many multiples of 5 are below 1025?",
    "solution": "There are $\\boxed{204}$.",
    "answer": "204",
    "url": "https://wiki.example/2024_AIME_I_Problems/Problem_1",
    "year": "2024",
}
AIME_CAPITALISED = {
    "ID": "2024-I-2",
    "Problem": "What is $5^2$?",
    "Solution": "It is 25.",
    "Answer": 25,
}
AIME_BY_ADDRESS = {
    "problem": "What is $4^2+9$?",
    "answer": "025",
    "id": "aime25-1",
}
AMC = {
    "id": 0,
    "problem": "What is $100 + 42$?",
    "answer": 142.0,
    "url": "https://wiki.example/2023_AMC_12A_Problems/Problem_1",
}
AMC_AS_QUESTION = {"id": 3, "question": "What is $9 + 18$?", "answer": "27.0", "url": "u"}
MINERVA = {
    "problem": "A star is seen at an angle of 0.1 arcsec. Find its distance in pc.",
    "solution": "It is \\boxed{5}, no: $1/0.1$, so \\boxed{10 \\text{ pc}}.",
    "type": "Introduction to Astronomy",
    "idx": 0,
}
OLYMPIADBENCH = {
    "id": 1606,
    "subfield": "Algebra",
    "context": None,
    "question": "Find all $x$ with $x^2=9$.",
    "solution": ["The roots are $3$ and $-3$."],
    "final_answer": ["$3$", "$-3$"],
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "question_type": "Open-ended",
    "subject": "Math",
    "language": "English",
}
OLYMPIADBENCH_PHYSICS = OLYMPIADBENCH | {
    "id": 1607,
    "context": "A stone falls from rest.",
    "question": "How far does it fall in one second?",
    "final_answer": ["4.9"],
    "is_multiple_answer": False,
    "unit": "m",
    "error": "1e-1",
}

ROWS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "gsm8k": [(GSM8K, "1042")],
    "math500": [(MATH500, "\\frac{3}{4}")],
    "aime": [(AIME_WITH_SOLUTION, "204"), (AIME_CAPITALISED, "25"), (AIME_BY_ADDRESS, "25")],
    "amc": [(AMC, "142"), (AMC_AS_QUESTION, "27")],
    "minerva": [(MINERVA, "10 \\text{ pc}")],
    "olympiadbench": [(OLYMPIADBENCH, "3, -3"), (OLYMPIADBENCH_PHYSICS, "4.9")],
}
"""Rows by format, each with its answer as text."""
