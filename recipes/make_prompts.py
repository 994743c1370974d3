"""Write prompts for a model to answer, so that look-ahead rows can be trained on its answers.

    python recipes/make_prompts.py TEXT OUT.jsonl [--count N] [--seed S]

Reads the folder that `fetch_text.py` wrote and writes one JSON object per line: `id`, `kind`,
either `prompt` (raw text to continue) or `messages` (a chat), and `max_new_tokens`. The same text,
count and seed give the same file. The kinds are shuffled, so that the first lines of the file are a
random sample of it.

No prompt comes from a test set: functions, tasks, problems and writing prompts are defined here or
taken from the training text, which contains nothing that the benchmarks use.
"""

import argparse
import ast
import json
import os
import random
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, islice, pairwise
from pathlib import Path
from typing import Any

Prompts = Iterator[str]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

SHORTEST, LONGEST = 16, 1600
"""Minimum and maximum length of a prompt in characters."""

LIBRARIES = ("stdlib", "django", "sympy")

WELL_KNOWN = re.compile(
    r"prime|fib|palindrom|gcd|greatest_common|factori|collatz|vowel|bracket|parenthes|roman"
    r"|monotonic|median|intersper|derivative|triangle_area|fizz|md5|remove_dup"
)
"""Matches names of functions that resemble well-known test tasks, which are left out."""


# The tasks of the `function` prompts: names, arguments, result, descriptions, and a function that
# computes the examples. An argument is a kind, or "name/name:kind" to choose from these names.


@dataclass(frozen=True)
class Task:
    """Small function that can be described, called and computed.

    Attributes:
        names: Possible function names, separated by spaces.
        arguments: Kinds of the arguments, each with optional names, separated by spaces.
        result: Type annotation of the result.
        texts: Possible descriptions; `{0}` is the name of the first argument.
        answer: Function that computes the result.
    """

    names: str
    arguments: str
    result: str
    texts: tuple[str, ...]
    answer: Callable[..., Any]


# fmt: off
TYPES = {
    "ints": "List[int]", "int": "int", "big": "int", "floats": "List[float]", "word": "str",
    "text": "str", "words": "List[str]", "grid": "List[List[int]]", "scores": "Dict[str, int]",
    "letter": "str", "pairs": "List[Tuple[str, int]]", "float": "float",
}
ARGUMENT_NAMES = {
    "ints": "numbers values nums items data sequence", "int": "n k", "big": "number value n",
    "floats": "values measurements samples xs", "word": "word s name", "letter": "letter char c",
    "text": "text sentence line s message", "words": "words names items strings",
    "grid": "grid matrix rows table", "scores": "scores counts stock points",
    "pairs": "pairs entries records", "float": "x value amount",
}
MEANINGS = {
    "ints": "The numbers, in any order.", "int": "A positive integer.",
    "big": "A positive integer.", "floats": "The measured values.", "word": "A single word.",
    "text": "A line of text.", "words": "Some words.", "grid": "Rows of the same length.",
    "scores": "A number for each name.", "letter": "A single character.",
    "pairs": "Names, each with a number.", "float": "A number.",
}
WORDS = (
    "apple", "river", "stone", "garden", "window", "coffee", "planet", "silver", "button",
    "market", "yellow", "winter", "pencil", "forest", "basket", "candle", "tiger", "rocket",
    "summer", "bridge", "violin", "orange", "ladder", "marble", "cotton", "island", "pepper",
    "harbor", "lemon", "castle", "anchor", "meadow", "copper", "sparrow", "level", "noon",
    "drum", "lamp", "cloud", "kite",
)
TEXTS = (
    "the quick brown fox", "Meet me at noon by the old bridge", "rain, rain, go away",
    "Two plus 2 is 4", "a rose is a rose", "Hello there, General", "One fish two fish red fish",
    "The cat sat on the mat", "Call 555 before 9 pm", "to be or not to be", "Winter is long here",
    "she sells sea shells", "red green blue red", "Open the door, please!", "no news is good news",
    "Bring milk and eggs", "ABC abc 123", "Every good boy does fine", "room 12 on floor 3",
)
TASKS = (
    Task("count_above how_many_above", "ints limit/bound/level:int", "int",
         ("Count the numbers in {0} that are larger than {1}.",
          "How many elements of {0} exceed {1}?"), lambda a, b: sum(x > b for x in a)),
    Task("sum_of_multiples add_multiples", "ints divisor/k/base:int", "int",
         ("Add up the elements of {0} that are divisible by {1}.",
          "Return the sum of those values in {0} which {1} divides evenly."),
         lambda a, b: sum(x for x in a if x % b == 0)),
    Task("pairwise_differences steps_between", "ints", "List[int]",
         ("Return the differences between neighbours in {0}, each minus the one before it.",),
         lambda a: [y - x for x, y in pairwise(a)]),
    Task("running_total cumulative_sum", "ints", "List[int]",
         ("Return a list whose i-th element is the sum of the first i + 1 elements of {0}.",
          "Compute the running totals of {0}."), lambda a: list(accumulate(a))),
    Task("chunk split_into_chunks in_groups", "ints size/n/width:small", "List[List[int]]",
         ("Split {0} into lists of {1} elements; the last may be shorter.",
          "Cut {0} into consecutive pieces of length {1}."),
         lambda a, b: [a[i:i + b] for i in range(0, len(a), b)]),
    Task("index_of_smallest where_smallest", "ints", "int",
         ("Return the index of the first smallest element of {0}.",
          "Find the position at which the smallest number in {0} first appears."),
         lambda a: a.index(min(a))),
    Task("value_range spread", "ints", "int",
         ("Return how far the largest element of {0} is from the smallest.",
          "The spread of a list is its maximum minus its minimum. Compute it for {0}."),
         lambda a: max(a) - min(a)),
    Task("longest_run longest_streak", "ints", "int",
         ("Return the length of the longest stretch of equal neighbours in {0}.",),
         lambda a: max(len(list(g)) for _, g in groupby(a))),
    Task("drop_every_nth skip_every", "ints step/n/k:small", "List[int]",
         ("Return {0} without every {1}-th element, counting from one.",),
         lambda a, b: [x for i, x in enumerate(a, 1) if i % b]),
    Task("clamp_all limit_values", "ints low/smallest:small high/largest:int", "List[int]",
         ("Raise the elements of {0} below {1} to {1}, and lower those above {2} to {2}.",),
         lambda a, b, c: [min(max(x, b), c) for x in a]),
    Task("peaks local_peaks", "ints", "List[int]",
         ("Return the elements of {0} that are larger than both of their neighbours.",),
         lambda a: [y for x, y, z in zip(a, a[1:], a[2:], strict=False) if x < y > z]),
    Task("swap_ends exchange_ends", "ints", "List[int]",
         ("Return a copy of {0} with its first and its last element exchanged.",),
         lambda a: [a[-1], *a[1:-1], a[0]]),
    Task("partition_by split_at_pivot", "ints pivot/limit:int", "Tuple[List[int], List[int]]",
         ("Return two lists: the elements of {0} below {1}, and all the others, in order.",),
         lambda a, b: ([x for x in a if x < b], [x for x in a if x >= b])),
    Task("moving_sum window_sums", "ints width/window/size:small", "List[int]",
         ("Return the sums of all windows of {1} neighbouring elements of {0}.",),
         lambda a, b: [sum(a[i:i + b]) for i in range(len(a) - b + 1)]),
    Task("alternating_sum plus_minus", "ints", "int",
         ("Add the elements of {0} at even positions and subtract those at odd positions.",),
         lambda a: sum(a[::2]) - sum(a[1::2])),
    Task("lead_of_largest winning_margin", "ints", "int",
         ("Return by how much the largest element of {0} exceeds the next one in size.",),
         lambda a: sorted(a)[-1] - sorted(a)[-2]),
    Task("pairs_apart count_pairs_with_difference", "ints gap/diff:small", "int",
         ("Count the pairs of positions in {0} whose values differ by exactly {1}.",),
         lambda a, b: sum(abs(x - y) == b for i, x in enumerate(a) for y in a[:i])),
    Task("repeat_each duplicate_each", "ints times/count:small", "List[int]",
         ("Return a list in which every element of {0} stands {1} times in a row.",),
         lambda a, b: [x for x in a for _ in range(b)]),
    Task("most_frequent commonest_value", "ints", "int",
         ("Return the value that occurs most often in {0}; the smallest one if several do.",),
         lambda a: min(a, key=lambda x: (-a.count(x), x))),
    Task("ranks rank_of_each", "ints", "List[int]",
         ("Replace every element of {0} with the number of distinct elements below it.",),
         lambda a: [sum(y < x for y in set(a)) for x in a]),
    Task("first_repeat first_seen_twice", "ints", "Optional[int]",
         ("Return the first element of {0} that has occurred before, or None.",),
         lambda a: next((x for i, x in enumerate(a) if x in a[:i]), None)),
    Task("zigzag interleave_ends", "ints", "List[int]",
         ("Take elements from the front and from the back of {0} by turns until all are taken.",),
         lambda a: [a[i // 2] if i % 2 == 0 else a[-1 - i // 2] for i in range(len(a))]),
    Task("product_without_zeros nonzero_product", "ints", "int",
         ("Multiply all elements of {0} that are not zero. With none, the result is 1.",),
         lambda a: list(accumulate([1, *[x for x in a if x]], lambda x, y: x * y))[-1]),
    Task("count_increases times_risen", "ints", "int",
         ("Count how often an element of {0} is larger than the one before it.",),
         lambda a: sum(y > x for x, y in pairwise(a))),
    Task("pad_to extend_to", "ints length/size:small filler/fill:small", "List[int]",
         ("Append {2} to a copy of {0} until it has at least {1} elements.",),
         lambda a, b, c: a + [c] * (b - len(a))),
    Task("interval_mean mean_between", "floats low:small high:big", "float",
         ("Return the mean of the elements of {0} from {1} to {2}, or 0.0 if there are none. "
          "Round to two decimals.",),
         lambda a, b, c: _mean([x for x in a if b <= x <= c])),
    Task("to_percentages as_percentages", "floats", "List[float]",
         ("Express every element of {0} in percent of their sum, rounded to one decimal.",),
         lambda a: [round(100 * x / sum(a), 1) for x in a]),
    Task("largest_jump biggest_step", "floats", "float",
         ("Return the largest absolute difference between neighbours in {0}, to one decimal.",),
         lambda a: max(round(abs(y - x), 1) for x, y in pairwise(a))),
    Task("round_all rounded", "floats", "List[int]",
         ("Round every element of {0} down to a whole number.",), lambda a: [int(x) for x in a]),
    Task("weighted_total dot", "weights/factors:ints amounts/values:ints", "int",
         ("Multiply {0} and {1} element by element, as far as both go, and add the products.",),
         lambda a, b: sum(x * y for x, y in zip(a, b, strict=False))),
    Task("merge_sorted merge", "left/first/a:sorted right/second/b:sorted", "List[int]",
         ("Merge the sorted lists {0} and {1} into one sorted list.",),
         lambda a, b: sorted(a + b)),
    Task("only_in_first missing_from", "first/left:ints second/right:ints", "List[int]",
         ("Return the elements of {0} that are not in {1}, in their order.",),
         lambda a, b: [x for x in a if x not in b]),
    Task("initials make_initials", "words", "str",
         ("Join the upper-case first letters of {0} into one string.",
          "Build an acronym from the first letters of {0}."),
         lambda a: "".join(x[0].upper() for x in a)),
    Task("total_length letters_in_all", "words", "int",
         ("Return the number of characters in all of {0} together.",), lambda a: sum(map(len, a))),
    Task("longer_than words_longer_than", "words length/limit/size:five", "List[str]",
         ("Return those of {0} that have more than {1} characters.",),
         lambda a, b: [x for x in a if len(x) > b]),
    Task("group_by_first group_by_initial", "words", "Dict[str, List[str]]",
         ("Map every first letter to the list of those of {0} that begin with it.",),
         lambda a: {k: [x for x in a if x[0] == k] for k in dict.fromkeys(x[0] for x in a)}),
    Task("index_words positions_of_words", "words", "Dict[str, int]",
         ("Map each of {0} to the position at which it first occurs.",),
         lambda a: {x: a.index(x) for x in dict.fromkeys(a)}),
    Task("number_lines numbered", "words", "List[str]",
         ("Put a number, counting from one, a dot and a space before each of {0}.",),
         lambda a: [f"{i}. {x}" for i, x in enumerate(a, 1)]),
    Task("join_with_and list_in_words", "words", "str",
         ("Join {0} with commas, but put the word 'and' before the last one.",),
         lambda a: ", ".join(a[:-1]) + " and " + a[-1]),
    Task("sort_by_last_letter order_by_ending", "words", "List[str]",
         ("Sort {0} by their last letters; those with the same one stay in order.",),
         lambda a: sorted(a, key=lambda x: x[-1])),
    Task("pad_words align_right", "words", "List[str]",
         ("Pad each of {0} with spaces on the left so that all are as long as the longest.",),
         lambda a: [x.rjust(max(map(len, a))) for x in a]),
    Task("ends_with_any keep_ending", "words letter/ending:letter", "List[str]",
         ("Return those of {0} that end in {1}.",), lambda a, b: [x for x in a if x.endswith(b)]),
    Task("shared_letters letters_in_both", "first/left/a:word second/right/b:word", "str",
         ("Return the letters that occur both in {0} and in {1}, in alphabetical order.",),
         lambda a, b: "".join(sorted(set(a) & set(b)))),
    Task("common_suffix shared_ending", "first/left/a:word second/right/b:word", "str",
         ("Return the longest ending that {0} and {1} have in common.",),
         lambda a, b: _shared_start(a[::-1], b[::-1])[::-1]),
    Task("matching_positions same_places", "first/left/a:word second/right/b:word", "int",
         ("Count the positions at which {0} and {1} have the same letter.",),
         lambda a, b: sum(x == y for x, y in zip(a, b, strict=False))),
    Task("count_letter occurrences", "text letter", "int",
         ("Count how often {1} occurs in {0}, in upper or lower case.",),
         lambda a, b: a.lower().count(b)),
    Task("word_lengths lengths", "text", "List[int]",
         ("Return the length of every word of {0}. Words are separated by spaces.",),
         lambda a: [len(x) for x in a.split()]),
    Task("title_case capitalize_words", "text", "str",
         ("Make the first letter of every word of {0} upper-case and leave the others alone.",),
         lambda a: " ".join(x[0].upper() + x[1:] for x in a.split())),
    Task("reverse_words backwards", "text", "str",
         ("Return the words of {0} in reverse order, separated by single spaces.",),
         lambda a: " ".join(a.split()[::-1])),
    Task("mirror_each reverse_each_word", "text", "str",
         ("Reverse the letters of every word of {0} but keep the words in place.",),
         lambda a: " ".join(x[::-1] for x in a.split())),
    Task("word_counts count_words", "text", "Dict[str, int]",
         ("Map every lower-cased word of {0} to the number of times it occurs.",),
         lambda a: dict(Counter(a.lower().split()))),
    Task("slugify make_slug", "text", "str",
         ("Lower-case {0}, drop all but letters, digits and spaces, and join words with '-'.",),
         lambda a: "-".join(re.sub(r"[^a-z0-9 ]", "", a.lower()).split())),
    Task("snake_case to_snake_case", "text", "str",
         ("Join the lower-cased words of {0} with underscores.",),
         lambda a: "_".join(a.lower().split())),
    Task("extract_digits digits_only", "text", "str",
         ("Return the digits that occur in {0}, in order, as a string.",),
         lambda a: "".join(x for x in a if x.isdigit())),
    Task("shorten truncate_text", "text width/limit/length:wide", "str",
         ("If {0} is longer than {1}, cut it to {1} characters with '...' as the last three.",),
         lambda a, b: a if len(a) <= b else a[:b - 3] + "..."),
    Task("shortest_word find_shortest_word", "text", "str",
         ("Return the shortest word of {0}, the last one if there are several.",),
         lambda a: min(a.split()[::-1], key=len)),
    Task("mask_word censor", "text word/secret:the", "str",
         ("Replace every occurrence of {1} in {0} with as many stars.",),
         lambda a, b: a.replace(b, "*" * len(b))),
    Task("run_length compress_runs", "runs", "List[Tuple[str, int]]",
         ("Return each stretch of equal characters in {0} as the character and its length.",),
         lambda a: [(k, len(list(g))) for k, g in groupby(a)]),
    Task("squeeze remove_repeats", "runs", "str",
         ("Shorten every stretch of equal neighbouring characters in {0} to one character.",),
         lambda a: "".join(k for k, _ in groupby(a))),
    Task("every_other_upper alternate_case", "word", "str",
         ("Make the letters of {0} upper-case and lower-case by turns, upper-case first.",),
         lambda a: "".join(x.lower() if i % 2 else x.upper() for i, x in enumerate(a))),
    Task("middle middle_part", "word", "str",
         ("Return {0} without its first and last character.",), lambda a: a[1:-1]),
    Task("letter_values alphabet_positions", "word", "List[int]",
         ("Return the place in the alphabet of every letter of {0}, counting from one.",),
         lambda a: [ord(x) - 96 for x in a]),
    Task("is_isogram all_letters_differ", "word", "bool",
         ("Say whether no letter occurs twice in {0}.",), lambda a: len(set(a)) == len(a)),
    Task("contains_in_order is_hidden_in", "word part/hidden:short", "bool",
         ("Check whether the letters of {1} occur in {0} in this order, perhaps with gaps.",),
         lambda a, b: bool(re.search(".*".join(b), a))),
    Task("echo_ending echo", "word n/count/k:small", "str",
         ("Append the last {1} letters of {0} to it once more.",), lambda a, b: a + a[-b:]),
    Task("staircase growing_parts", "word", "List[str]",
         ("Return the endings of {0}, from the whole word down to its last letter.",),
         lambda a: [a[i:] for i in range(len(a))]),
    Task("transpose flip_table", "grid", "List[List[int]]",
         ("Turn the rows of {0} into columns.",),
         lambda a: [list(x) for x in zip(*a, strict=True)]),
    Task("row_sums sums_of_rows", "grid", "List[int]",
         ("Return the sum of each row of {0}.",), lambda a: [sum(x) for x in a]),
    Task("column_maxima tallest_in_columns", "grid", "List[int]",
         ("Return the largest element of each column of {0}.",),
         lambda a: [max(x) for x in zip(*a, strict=True)]),
    Task("flatten flatten_rows", "grid", "List[int]",
         ("Return all elements of {0} in one list, row by row.",),
         lambda a: [y for x in a for y in x]),
    Task("rotate_grid turn_right", "grid", "List[List[int]]",
         ("Rotate {0} clockwise by a quarter turn.",),
         lambda a: [list(x) for x in zip(*a[::-1], strict=True)]),
    Task("count_in_grid cells_equal_to", "grid target/wanted:small", "int",
         ("Count the cells of {0} that are equal to {1}.",),
         lambda a, b: sum(x.count(b) for x in a)),
    Task("border_sum sum_of_edges", "grid", "int",
         ("Add the elements in the first and in the last row of {0}.",),
         lambda a: sum(a[0]) + sum(a[-1])),
    Task("scale_grid multiply_table", "grid factor/k:small", "List[List[int]]",
         ("Multiply every element of {0} by {1}.",), lambda a, b: [[y * b for y in x] for x in a]),
    Task("best_key winner", "scores", "str",
         ("Return the name with the highest number in {0}.",
          "Who leads? Find the key of {0} with the largest value."), lambda a: max(a, key=a.get)),
    Task("names_above keys_above", "scores limit/minimum:int", "List[str]",
         ("Return the sorted names whose number in {0} is above {1}.",),
         lambda a, b: sorted(k for k in a if a[k] > b)),
    Task("invert swap_keys_and_values", "scores", "Dict[int, List[str]]",
         ("Map every number in {0} to the sorted list of the names that have it.",),
         lambda a: {v: sorted(k for k in a if a[k] == v) for v in a.values()}),
    Task("add_counts combine", "left/a:scores right/b:scores", "Dict[str, int]",
         ("Add the numbers in {0} and {1} name by name, those of {0} first.",),
         lambda a, b: {k: a.get(k, 0) + b.get(k, 0) for k in a | b}),
    Task("average_score mean_value", "scores", "float",
         ("Return the mean of the numbers in {0}, rounded to two decimals.",),
         lambda a: _mean(list(a.values()))),
    Task("totals_by_name sum_by_name", "pairs", "Dict[str, int]",
         ("Add up the numbers in {0} that belong to the same name.",),
         lambda a: {k: sum(v for x, v in a if x == k) for k, _ in a}),
    Task("sort_by_number order_pairs", "pairs", "List[str]",
         ("Return the names in {0}, the one with the largest number first.",),
         lambda a: [x for x, _ in sorted(a, key=lambda p: -p[1])]),
    Task("halvings count_halvings", "big", "int",
         ("Count how often {0} can be halved before it is odd.",),
         lambda a: (a & -a).bit_length() - 1),
    Task("digit_span spread_of_digits", "big", "int",
         ("Return the largest decimal digit of {0} minus the smallest.",),
         lambda a: int(max(str(a))) - int(min(str(a)))),
    Task("reverse_number mirror_number", "big", "int",
         ("Return {0} with its decimal digits in reverse order.",), lambda a: int(str(a)[::-1])),
    Task("divisors all_divisors", "big", "List[int]",
         ("Return all divisors of {0} in increasing order.",),
         lambda a: [x for x in range(1, a + 1) if a % x == 0]),
    Task("countdown count_down", "start/n:int step/by:small", "List[int]",
         ("Count down from {0} in steps of {1} as long as the number is positive.",),
         lambda a, b: list(range(a, 0, -b))),
    Task("multiplication_row times_table", "n/number:int length/upto:small", "List[int]",
         ("Return the first {1} multiples of {0}.",),
         lambda a, b: [a * i for i in range(1, b + 1)]),
    Task("format_duration clock", "time/duration:long", "str",
         ("Write {0}, given in seconds, as hours, minutes and seconds: H:MM:SS.",),
         lambda a: f"{a // 3600}:{a // 60 % 60:02}:{a % 60:02}"),
    Task("coins_needed make_change", "amount/cents:big", "Dict[int, int]",
         ("Pay {0} with as few coins of 50, 20, 10, 5, 2 and 1 as possible; map coins to counts.",),
         lambda a: _coins(a)),
    Task("round_up_to next_multiple", "number/value:big step/base:small", "int",
         ("Return the smallest multiple of {1} that is not less than {0}.",),
         lambda a, b: -(-a // b) * b),
    Task("fahrenheit to_fahrenheit", "celsius/temperature:float", "float",
         ("Convert {0} from degrees Celsius to degrees Fahrenheit, rounded to one decimal.",),
         lambda a: round(a * 9 / 5 + 32, 1)),
    Task("discounted price_after_discount", "price/amount:float discount/off:int", "float",
         ("Take {1} percent off {0} and round to two decimals.",),
         lambda a, b: round(a * (100 - b) / 100, 2)),
    Task("is_leap leap_year", "year/y:year", "bool",
         ("Tell whether {0} is a leap year in the Gregorian calendar.",),
         lambda a: a % 4 == 0 and (a % 100 != 0 or a % 400 == 0)),
    Task("overlap overlap_length", "start1:int end1:big start2:int end2:big", "int",
         ("Return how much the interval from {0} to {1} overlaps with that from {2} to {3}.",),
         lambda a, b, c, d: max(0, min(b, d) - max(a, c))),
    Task("manhattan city_distance", "x1:int y1:int x2:int y2:int", "int",
         ("Return the number of blocks between ({0}, {1}) and ({2}, {3}) on a grid of streets.",),
         lambda a, b, c, d: abs(a - c) + abs(b - d)),
)
# fmt: on


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 2) if values else 0.0


def _shared_start(first: str, second: str) -> str:
    count = 0
    while first[count : count + 1] == second[count : count + 1] != "":
        count += 1
    return first[:count]


def _coins(amount: int) -> dict[int, int]:
    counts = {}
    for coin in (50, 20, 10, 5, 2, 1):
        if amount >= coin:
            counts[coin], amount = divmod(amount, coin)
    return counts


NARROW_KINDS = {
    "small": "int",
    "five": "int",
    "wide": "int",
    "year": "int",
    "long": "int",
    "sorted": "ints",
    "the": "word",
    "short": "word",
    "runs": "word",
}


def random_value(kind: str, rng: random.Random) -> Any:
    """Return a random argument for an example call."""
    makers: dict[str, Callable[[], Any]] = {
        "ints": lambda: _numbers(rng),
        "sorted": lambda: sorted(_numbers(rng)),
        "int": lambda: rng.randint(3, 12),
        "small": lambda: rng.randint(2, 4),
        "five": lambda: rng.randint(4, 6),
        "wide": lambda: rng.randint(10, 16),
        "year": lambda: rng.choice([rng.randint(1880, 2060), 1900, 2000, 2024]),
        "long": lambda: rng.randint(50, 9000),
        "big": lambda: rng.randint(12, 160),
        "float": lambda: round(rng.uniform(2, 90), 1),
        "floats": lambda: [round(rng.uniform(0, 20), 1) for _ in range(rng.randint(3, 5))],
        "word": lambda: rng.choice(WORDS),
        "words": lambda: rng.sample(WORDS, rng.randint(3, 5)),
        "text": lambda: rng.choice(TEXTS),
        "letter": lambda: rng.choice("aenrst"),
        "the": lambda: rng.choice(("the", "red", "rain", "fish", "is", "be")),
        "short": lambda: "".join(rng.sample("aeilnrst", 2)),
        "runs": lambda: "".join(rng.choice("abxy") * rng.randint(1, 4) for _ in range(4)),
        "grid": lambda: _grid(rng),
        "scores": lambda: {name: rng.randint(1, 15) for name in rng.sample(NAMES, 3)},
        "pairs": lambda: [(rng.choice(NAMES[:5]), rng.randint(1, 15)) for _ in range(4)],
    }
    return makers[kind]()


def _numbers(rng: random.Random) -> list[int]:
    low, high = rng.choice([(0, 9), (1, 5), (1, 20), (0, 3), (-5, 9)])
    return [rng.randint(low, high) for _ in range(rng.randint(3, 7))]


def _grid(rng: random.Random) -> list[list[int]]:
    width = rng.randint(2, 3)
    return [[rng.randint(0, 9) for _ in range(width)] for _ in range(rng.randint(2, 3))]


@dataclass(frozen=True)
class Wording:
    """Task with chosen names and description."""

    name: str
    arguments: tuple[str, ...]
    kinds: tuple[str, ...]
    result: str
    text: str
    task: Task

    def head(self) -> str:
        """Return the signature of the function."""
        types = [TYPES[NARROW_KINDS.get(kind, kind)] for kind in self.kinds]
        typed = zip(self.arguments, types, strict=True)
        return f"def {self.name}({', '.join(f'{a}: {t}' for a, t in typed)}) -> {self.result}:"

    def example(self, rng: random.Random) -> tuple[str, str]:
        """Return a random call and its result; results that are empty or zero are rare."""
        for _ in range(3):
            values = [random_value(kind, rng) for kind in self.kinds]
            if repr(self.task.answer(*values)) not in ("0", "[]", "''"):
                break
        call = f"{self.name}({', '.join(map(repr, values))})"
        return call, repr(self.task.answer(*values))


def word_task(task: Task, rng: random.Random) -> Wording:
    """Choose a description and names for the function and its arguments."""
    names: list[str] = []
    kinds = []
    draw = rng.random()  # one draw for all arguments, so that `left` is paired with `right`
    for argument in task.arguments.split():
        choices, _, kind = argument.rpartition(":")
        pool = choices.split("/") if choices else _default_names(kind)
        pool = [name for name in pool if name not in names]
        names.append(pool[int(draw * len(pool))])
        kinds.append(kind)
    text = rng.choice(task.texts).format(*names)
    function = rng.choice(task.names.split())
    return Wording(function, tuple(names), tuple(kinds), task.result, text, task)


def _default_names(kind: str) -> list[str]:
    return ARGUMENT_NAMES[NARROW_KINDS.get(kind, kind)].split()


def function_prompt(wording: Wording, rng: random.Random) -> str:
    """Return a function's signature and docstring, in one of several styles."""
    lines = textwrap.wrap(wording.text, rng.choice((72, 80, 88)))
    if rng.random() < 0.2:
        lines += ["", "Args:", *_explained(wording)]
    lines += _examples(wording, rng)
    opening = rng.choice(('""" ', '"""', '"""', '"""\n'))
    quote = rng.choice(('"""', '"""', '"""', "'''"))
    body = textwrap.indent(opening + "\n".join(lines) + '\n"""\n', "    ").replace('"""', quote)
    prompt = f"{wording.head()}\n{body}"
    if rng.random() < 0.5:
        prompt = re.sub(r"\b(List|Dict|Tuple)\[", lambda match: match[0].lower(), prompt)
    used = sorted(set(re.findall(r"\b(Dict|List|Optional|Tuple)\[", prompt)))
    return (f"from typing import {', '.join(used)}\n\n\n" if used else "") + prompt


def _explained(wording: Wording) -> list[str]:
    kinds = [NARROW_KINDS.get(kind, kind) for kind in wording.kinds]
    pairs = zip(wording.arguments, kinds, strict=True)
    return [f"    {name}: {MEANINGS[kind]}" for name, kind in pairs]


def _examples(wording: Wording, rng: random.Random) -> list[str]:
    calls = dict(wording.example(rng) for _ in range(rng.randint(1, 3)))
    style = rng.random()
    if style < 0.6:
        return [line for call, value in calls.items() for line in (f">>> {call}", value)]
    if style < 0.75:
        return ["", "Examples:", *(f"    {call} == {value}" for call, value in calls.items())]
    if style < 0.9:
        return ["For example:", *(f"{call} -> {value}" for call, value in calls.items())]
    return ["", *(f"{call} ➞ {value}" for call, value in calls.items())]


# Reading the folder that fetch_text.py wrote.


@cache
def leads(root: Path) -> tuple[str, ...]:
    """Return leads of Wikipedia articles."""
    return _texts(root / "text/wikipedia/leads.jsonl")


@cache
def codeio(root: Path) -> tuple[str, ...]:
    """Return modules that solve a task."""
    return _texts(root / "code/codeio/codeio.jsonl")


def _texts(file: Path) -> tuple[str, ...]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return tuple(json.loads(line)["text"] for line in lines if line)


@cache
def modules(root: Path) -> tuple[str, ...]:
    """Return the text of every file of the libraries."""
    files = [path for name in LIBRARIES for path in (root / "code" / name).rglob("*.py")]
    return tuple(path.read_text(encoding="utf-8") for path in sorted(files))


@cache
def country_paragraphs(root: Path) -> tuple[str, ...]:
    """Return long paragraphs of the factbook."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(root.glob("text/factbook/*.txt")))
    return tuple(line for text in texts for line in text.split("\n") if _is_prose(line))


def _is_prose(line: str) -> bool:
    return len(line) > 400 and line[0].isupper() and line.count(";") < 2


def parse(text: str) -> ast.Module | None:
    """Parse a module; return None on a syntax error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            return ast.parse(text)
        except SyntaxError:
            return None


def definitions(text: str) -> list[tuple[Definition, str]]:
    """Return the top-level functions and classes of a module, with their source."""
    parsed = parse(text)
    lines = text.split("\n")
    found = []
    for node in parsed.body if parsed else ():
        if isinstance(node, Definition):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found.append((node, "\n".join(lines[start - 1 : node.end_lineno]) + "\n"))
    return found


def shuffled(items: tuple[str, ...], rng: random.Random) -> list[str]:
    """Return the items in random order."""
    return rng.sample(items, len(items))


def in_turns(*streams: Prompts) -> Prompts:
    """Yield one item of each stream in turn, until all streams are exhausted."""
    waiting = list(streams)
    while waiting:
        for stream in tuple(waiting):
            item = next(stream, None)
            if item is None:
                waiting.remove(stream)
            else:
                yield item


def cut_at_docstring(text: str, node: Definition) -> str | None:
    """Return a function up to the end of its docstring, or None if it is unsuitable."""
    docstring = ast.get_docstring(node)
    if docstring is None or not 60 <= len(docstring) <= 700 or isinstance(node, ast.ClassDef):
        return None
    first = node.body[0]
    lines = text.split("\n")[node.lineno - 1 : first.end_lineno]
    good = lines[-1].rstrip().endswith(('"""', "'''")) and len(node.body) > 1
    unfit = WELL_KNOWN.search(node.name.lower()) or re.search(r"(?i)deprecated|^\.\. ", docstring)
    return None if unfit or not good else "\n".join(lines) + "\n"


def documented_functions(texts: list[str], rng: random.Random, imports: bool) -> Prompts:
    """Yield one documented function of each module, cut after its docstring."""
    for text in texts:
        cut = [c for node, _ in definitions(text) if (c := cut_at_docstring(text, node))]
        if cut:
            yield (_imports(text) if imports else "") + rng.choice(cut)


def _imports(text: str) -> str:
    parsed = parse(text)
    nodes = [n for n in parsed.body if isinstance(n, ast.Import | ast.ImportFrom)] if parsed else []
    lines = list(dict.fromkeys(ast.unparse(node) for node in nodes))
    return "\n".join(lines) + "\n\n\n" if lines else ""


def task_functions(rng: random.Random) -> Prompts:
    """Yield functions from `TASKS` without end; every task is used once before any is repeated."""
    while True:
        for task in rng.sample(TASKS, len(TASKS)):
            yield function_prompt(word_task(task, rng), rng)


def functions(root: Path, rng: random.Random) -> Prompts:
    """Yield functions: half from `TASKS`, the rest from libraries and from solved tasks."""
    library = documented_functions(shuffled(modules(root), rng), rng, imports=False)
    solved = documented_functions(shuffled(codeio(root), rng), rng, imports=True)
    return in_turns(task_functions(rng), in_turns(library, solved), task_functions(rng), library)


def code(root: Path, rng: random.Random) -> Prompts:
    """Yield beginnings of functions and classes; every module is used before any is repeated."""
    return in_turns(*(_beginnings(text, rng) for text in shuffled(modules(root), rng)))


def _beginnings(text: str, rng: random.Random) -> Prompts:
    found = definitions(text)
    for _, body in rng.sample(found, len(found)):
        if (beginning := cut_at_line(body)) is not None:
            yield beginning


def cut_at_line(text: str) -> str | None:
    """Cut text at the line end nearest to 420 characters, between 350 and 600; None without one."""
    ends = [match.end() for match in re.finditer(r"\S\n", text)]
    ends = [end for end in ends if 350 <= end <= 600 and end < len(text) - 60]
    return text[: min(ends, key=lambda end: abs(end - 420))] if ends else None


def articles(root: Path, rng: random.Random) -> Prompts:
    """Yield beginnings of articles and, for one in four, of paragraphs about countries."""
    wikipedia = _cut_words(shuffled(leads(root), rng), rng)
    return in_turns(
        wikipedia, _cut_words(shuffled(country_paragraphs(root), rng), rng), wikipedia, wikipedia
    )


def _cut_words(texts: list[str], rng: random.Random) -> Prompts:
    for text in texts:
        length = rng.randint(150, 320)
        cut = text[: length + 1].rpartition(" ")[0].rstrip()
        if len(text) > length + 60 and len(cut) >= 150:
            yield cut


# Questions about the subjects of articles.

QUESTIONS = (
    "Explain {subject} to a twelve-year-old.",
    "Give me five facts about {subject}.",
    "Write a short encyclopedia entry about {subject}.",
    "Compare {subject} with {other}.",
    "Tell me about {subject}.",
    "Why is {subject} important?",
    "What should everyone know about {subject}?",
    "Summarize the history of {subject} in one paragraph.",
    "What are common misconceptions about {subject}?",
    "I have to give a two-minute talk about {subject}. What should I say?",
    "What do {subject} and {other} have in common?",
    "Write three quiz questions about {subject}, with answers.",
    "How would you describe {subject} in two sentences?",
    "List the most important terms somebody reading about {subject} should know.",
    "Where can I learn more about {subject}, and what should I look at first?",
    "In simple words, what makes {subject} interesting?",
    "My teacher mentioned {subject} today. Can you explain what that means?",
    "Write an introduction for an essay on {subject}.",
    "How has the view of {subject} changed over time?",
    "What questions do historians and scientists still ask about {subject}?",
    "Give a definition of {subject} and an example.",
    "Make a bulleted outline for a lesson about {subject}.",
    "Describe {subject} for a traveller's guidebook or a museum sign.",
    "Which three books or articles would you want to exist about {subject}? Explain briefly.",
    "Would most people recognize the name of {subject}? Why or why not?",
)
PERSON_QUESTIONS = (
    "Who {verb} {subject}?",
    "Who {verb} {subject}, and why do people remember the name?",
    "What is {subject} best known for?",
    "Describe the life and work of {subject}.",
    "Write a short biography of {subject}.",
    "What influence did {subject} have on others?",
    "If you could ask {subject} one question, what would it be?",
    "Tell me about {subject}.",
    "Give me five facts about {subject}.",
    "Explain to a twelve-year-old who {subject} {verb}.",
    "Which achievements of {subject} matter most today?",
    "Compare the lives of {subject} and {other}.",
)


PROFESSIONS = (
    "philosopher|painter|composer|writer|poet|physicist|mathematician|politician|emperor|pharaoh"
    "|actor|actress|singer|novelist|playwright|scientist|chemist|biologist|physician|sculptor"
    "|architect|explorer|inventor|engineer|astronomer|historian|revolutionary|dancer|musician"
    "|footballer|economist|theologian|statesman|filmmaker|director|photographer|astrologer"
)


@dataclass(frozen=True)
class Subject:
    """Subject of an article.

    Attributes:
        name: Name, as written within a sentence.
        verb: Verb of the article's first sentence: is, are, was or were.
        person: True if the subject is a person.
    """

    name: str
    verb: str
    person: bool


def subject_of(lead: str, common: frozenset[str]) -> Subject | None:
    """Return the subject of the first sentence, or None if it cannot be identified."""
    plain = re.sub(r" ?\([^()]*\)", "", lead[:500])
    match = re.match(r"([^.;:\"]{2,60}?) (is|are|was|were) (?:an? |the |one |any |[a-z])", plain)
    if match is None:
        return None
    name = re.split(r",| or ", match[1])[0].strip()
    unfit = re.search(r"^(In|It|On|At|This|There|As|For|From|Its|Their|After) |[()\[\]/]", name)
    verbs = re.search(r" (that|which|refers|has|had|who|can|of the term|also|include)( |$)", name)
    if unfit or verbs or len(name.split()) > 6 or len(name) < 3:
        return None
    person = match[2] in ("is", "was") and _is_person(name, lead)
    return Subject(name if person else _inner_case(name, common), match[2], person)


def common_words(texts: tuple[str, ...]) -> frozenset[str]:
    """Return the words that are mostly written in lower case within a sentence."""
    counts = Counter(word for text in texts for word in re.findall(r"(?<=[a-z] )[\w-]+", text))
    return frozenset(w for w in counts if w.islower() and counts[w] > counts[w.capitalize()])


def _inner_case(name: str, common: frozenset[str]) -> str:
    """Return the name as written within a sentence."""
    first, space, rest = name.partition(" ")
    small = first[:1].lower() + first[1:]
    usual = small in common or re.search(r"(ology|graphy|ics|ism)$", small)
    plain = rest == rest.lower() and usual
    return small + space + rest if plain or first in ("A", "An", "The") else name


def _is_person(name: str, lead: str) -> bool:
    first, last = name.split()[0], name.split()[-1]
    if not (first[0].isupper() and last[0].isupper()) or first in ("A", "An", "The"):
        return False
    if re.search(rf"\b(was|is) (an?|the) [^.]*\b({PROFESSIONS})\b", lead[:250]):
        return True
    work = re.search(r"\b(novel|film|painting|opera|play|poem|song|series|book|city)\b", lead[:150])
    return not work and bool(re.search(r"\b([Hh]e|[Ss]he|[Hh]is|[Hh]er)\b", lead))


def questions(root: Path, rng: random.Random) -> Prompts:
    """Yield questions about the subjects of articles.

    Questions that compare two subjects pair persons with persons and things with things.
    """
    common = common_words(leads(root))
    found = (subject_of(lead, common) for lead in shuffled(leads(root), rng))
    subjects = [subject for subject in found if subject]
    for subject in subjects:
        others = [s for s in rng.sample(subjects, min(20, len(subjects))) if s != subject]
        others = [s for s in others if s.person == subject.person] or others
        yield _question(subject, others[0].name if others else "its opposite", rng)


def _question(subject: Subject, other: str, rng: random.Random) -> str:
    templates: tuple[str, ...] = PERSON_QUESTIONS if subject.person else QUESTIONS
    if not subject.person and rng.random() < 0.15:
        templates = ("What {verb} {subject}?", "What {verb} {subject}? Answer in three sentences.")
    template = rng.choice(templates)
    if subject.verb in ("are", "were"):
        template = template.replace("is {subject}", "are {subject}")
        template = template.replace("makes {subject}", "makes {subject} so")
    return template.format(subject=subject.name, other=other, verb=subject.verb)


# Tasks about code.

CODE_TASKS = (
    "Write a Python function for this task. {text}",
    "{text}\n\nWrite a Python function that computes this.",
    "{text} Solve it with a short Python program.",
    "Implement the following in Python and explain your solution:\n\n{text}",
)
SMALL_TASKS = (
    "Write a Python function `{name}` for the following: {text}",
    "Write a Python function called `{name}({arguments})`. {text}",
    "Implement this function in Python:\n\n{head}\n\n{text}",
    "Show me how to do this in Python, with an explanation: {text}",
    "I need a Python function. {text} For example, `{call}` should return `{value}`.",
    "Write unit tests with pytest for a function `{head}` It does this: {text}",
    "{text} Give me a simple solution and then a shorter one.",
    "How would you write this in JavaScript? {text} The input is called {arguments}.",
    "Write `{name}` in Python with type hints and a docstring. {text}",
    "What does `{call}` return if `{name}` does the following? {text}",
)
SNIPPET_TASKS = (
    "Explain what this function does:\n\n```python\n{code}```",
    "Add a docstring to this function:\n\n```python\n{code}```",
    "Explain this code line by line.\n\n```python\n{code}```",
    "Write unit tests for this function:\n\n```python\n{code}```",
    "Rewrite this function so that it is easier to read:\n\n```python\n{code}```",
    "Which inputs could make this function fail?\n\n```python\n{code}```",
    "Add type hints to the following Python code:\n\n```python\n{code}```",
    "What would you criticize in a review of this function?\n\n```python\n{code}```",
    "```python\n{code}```\n\nTranslate this function to JavaScript.",
)
BUG_TASKS = (
    "Find the bug in this function:\n\n```python\n{code}```",
    "There is a mistake in this Python function. Find it and correct it.\n\n```python\n{code}```",
    "This function gives wrong results. What is wrong?\n\n```python\n{code}```",
)
MISTAKES = (
    (" < ", " > "),
    (" == ", " != "),
    (" + 1", " - 1"),
    (" and ", " or "),
    ("[0]", "[1]"),
    (" > ", " <= "),
    (" not in ", " in "),
    ("range(1, ", "range("),
)


def tasks(root: Path, rng: random.Random) -> Prompts:
    """Yield requests to write, explain, test or fix code."""
    return in_turns(
        _described_tasks(root, rng), _small_tasks(rng), _snippet_tasks(root, rng), _small_tasks(rng)
    )


def _described_tasks(root: Path, rng: random.Random) -> Prompts:
    for text in shuffled(codeio(root), rng):
        description = description_of(text)
        if description and len(description) < 900 and not WELL_KNOWN.search(description.lower()):
            yield rng.choice(CODE_TASKS).format(text=description)


def description_of(text: str) -> str | None:
    """Return the task of a module, from its docstring or that of its last function."""
    parsed = parse(text)
    if parsed is None:
        return None
    nodes = [node for node in parsed.body if isinstance(node, ast.FunctionDef)]
    docstring = ast.get_docstring(parsed) or (ast.get_docstring(nodes[-1]) if nodes else None)
    return re.split(r"\n\s*Input:", docstring)[0].strip() if docstring else None


def _small_tasks(rng: random.Random) -> Prompts:
    while True:
        for task in rng.sample(TASKS, len(TASKS)):
            wording = word_task(task, rng)
            call, value = wording.example(rng)
            text = re.sub(rf"\b({'|'.join(wording.arguments)})\b", r"`\1`", wording.text)
            yield rng.choice(SMALL_TASKS).format(
                name=wording.name,
                arguments=", ".join(wording.arguments),
                text=text,
                head=wording.head(),
                call=call,
                value=value,
            )


def _snippet_tasks(root: Path, rng: random.Random) -> Prompts:
    solved = _short_functions(shuffled(codeio(root), rng), rng)
    library = _short_functions(shuffled(modules(root), rng), rng)
    for snippet in in_turns(library, solved):
        mistaken = _with_mistake(snippet, rng) if rng.random() < 0.4 else None
        templates: tuple[str, ...] = SNIPPET_TASKS if mistaken is None else BUG_TASKS
        if '"""' in snippet and mistaken is None:
            templates = tuple(t for t in templates if "docstring" not in t)
        yield rng.choice(templates).format(code=mistaken or snippet)


def _short_functions(texts: list[str], rng: random.Random) -> Prompts:
    for text in texts:
        found = [s for node, s in definitions(text) if not isinstance(node, ast.ClassDef)]
        found = [s for s in found if 140 <= len(s) <= 700 and not WELL_KNOWN.search(s.lower())]
        if found:
            yield rng.choice(found)


def _with_mistake(snippet: str, rng: random.Random) -> str | None:
    possible = [(right, wrong) for right, wrong in MISTAKES if right in snippet]
    return snippet.replace(*rng.choice(possible), 1) if possible else None


# Word problems and writing tasks with placeholders: {3-9} becomes a random number, {name} a random
# name and {name2} a different one. Within a prompt, the same key always becomes the same word.

# fmt: off
NAMES = (
    "Ana", "Ben", "Chloe", "David", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kavya",
    "Luca", "Maya", "Nils", "Olga", "Pedro", "Quinn", "Rosa", "Sami", "Tara", "Umar", "Vera",
    "Wen", "Yusuf", "Zoe",
)
FILLS: dict[str, tuple[str, ...]] = {
    "name": NAMES,
    "things": ("notebooks", "oranges", "stickers", "bottles of juice", "light bulbs", "tickets",
               "muffins", "pencils", "postcards", "plants", "batteries", "paint brushes"),
    "vehicle": ("train", "bus", "cyclist", "truck", "ferry", "car", "drone"),
    "place": ("Lisbon", "Kyoto", "Cape Town", "Montreal", "Edinburgh", "Hanoi", "Cusco", "Tallinn",
              "Marrakesh", "Vienna", "Wellington", "Naples", "Oaxaca", "Bergen", "Krakow"),
    "topic": ("solar power", "public libraries", "learning a language", "working from home",
              "city cycling", "school uniforms", "keeping bees", "electric cars", "video games",
              "eating less meat", "night trains", "houseplants", "online courses", "volunteering",
              "running a marathon", "small museums", "board games", "space tourism", "handwriting",
              "second-hand clothes", "urban gardens", "early rising", "chess", "home cooking"),
    "object": ("an old lighthouse", "a broken clock", "a lost letter", "a talking crow",
               "a red umbrella", "the last bakery in town", "a map without names", "a paper boat",
               "a robot that collects shells", "a violin found in an attic", "a frozen lake",
               "a staircase that leads nowhere", "a very small dragon", "an empty train station"),
    "product": ("a folding bicycle", "a reusable water bottle", "noise-cancelling headphones",
                "a standing desk", "a rain jacket", "a coffee grinder", "a solar lamp",
                "a backpack", "an e-book reader", "a robot vacuum cleaner", "a camping stove"),
    "job": ("a lighthouse keeper", "a ship's cook", "a museum guide", "a beekeeper", "a detective",
            "a gardener at a royal palace", "a radio host", "a tour guide on Mars", "a librarian",
            "a medieval baker", "a football coach", "an astronaut", "a village doctor"),
    "season": ("spring", "summer", "autumn", "winter"),
    "tone": ("friendly", "formal", "humorous", "apologetic", "enthusiastic", "brief", "polite"),
    "relation": ("my landlord", "my neighbour", "a colleague", "my old teacher", "my grandmother",
                 "the manager of a hotel", "a new customer", "my team", "a friend abroad"),
    "matter": ("a broken heating", "moving to another city", "a postponed meeting", "a lost parcel",
               "an invitation to dinner", "borrowing a ladder", "a delayed report", "night noise",
               "a birthday party", "a change of working hours", "a recipe that went wrong"),
    "style": ("a pirate", "a news reporter", "a fairy tale", "a sports commentator", "a poet",
              "a strict teacher", "a five-year-old child", "a scientist", "an advertisement"),
    "dish": ("lentil soup", "apple pie", "vegetable curry", "pancakes", "fried rice", "flatbread",
             "potato salad", "tomato pasta", "bean stew", "banana bread"),
    "problem": ("sleeping badly", "stage fright", "losing track of time", "saving money",
                "a messy desk", "making friends in a new city", "too many emails", "exam nerves",
                "writer's block", "back pain from sitting", "choosing a career", "homesickness"),
    "idea": ("freedom", "honesty", "friendship", "progress", "beauty", "justice", "curiosity",
             "tradition", "solitude", "courage", "forgiveness", "luck"),
    "field": ("the Industrial Revolution", "the printing press", "Greek tragedy", "jazz",
              "the Silk Road", "Romantic painting", "the invention of writing", "stoicism",
              "the Roman Republic", "Gothic architecture", "the Harlem Renaissance",
              "the Cold War", "folk tales", "utilitarianism", "haiku", "opera"),
}
PROBLEMS = (
    "{name} buys {3-12} {things} at ${2-9} each and pays with a ${120-200} voucher. How much of"
    " the voucher is left?",
    "A {vehicle} covers {60-400} kilometres in {2-8} hours. What is its average speed?",
    "{name} is {3-15} years older than {name2}. Together they are {30-80} years old. How old is"
    " each of them?",
    "What is {11-99} times {11-99}? Show your work.",
    "Compute {100-999} + {100-999} - {10-99} step by step.",
    "A recipe for {2-5} people needs {200-900} grams of flour. How much flour does {name} need for"
    " {6-12} people?",
    "{name} has {20-90} {things} and gives {2-9} of them to each of {2-4} friends. How many are"
    " left?",
    "Convert {2-90} kilometres to miles. One mile is about 1.609 kilometres.",
    "Convert {40-110} degrees Fahrenheit to degrees Celsius and explain the formula.",
    "What is {1-4}/{5-9} + {1-4}/{5-9}? Give the result as a fraction in lowest terms.",
    "What is {1-3}/{4-7} of {40-200}?",
    "A shirt costs ${20-90}. It is reduced by {5-60} percent. What is the new price?",
    "{name} saves ${5-40} every week. After how many weeks are there at least ${200-900}?",
    "What comes next in this sequence, and why? {sequence}",
    "Find the missing rule: {sequence}, ... What would the tenth number be?",
    "{name}, {name2} and {name3} ran a race. {name} was faster than {name2} but slower than"
    " {name3}. Who came last?",
    "{name} sits to the left of {name2}. {name3} sits to the right of {name2}. {name4} sits between"
    " {name} and {name2}. In which order do they sit?",
    "A garden is {5-30} metres long and {3-20} metres wide. What are its area and its perimeter?",
    "A meeting starts at {8-11}:{10-55} and takes {35-170} minutes. When does it end?",
    "A box holds {4-24} {things}. How many boxes does {name} need for {100-500} {things}?",
    "Solve for x: {2-9}x + {3-30} = {31-99}.",
    "Solve for y and explain each step: {2-9}(y - {1-9}) = {10-90}.",
    "The average of {3-5} numbers is {10-40}. What is their sum?",
    "{name} reads {10-40} pages a day. {name2} reads {5-9} pages more each day. How many pages have"
    " both read after {4-14} days?",
    "A tank of {100-900} litres is filled at {5-25} litres a minute. How long does that take?",
    "There are {3-9} red, {3-9} blue and {2-8} green balls in a bag. How likely is it to draw a"
    " blue one?",
    "If all {things} in a shop are blue, and {name} bought something there that is not blue, did"
    " {name} buy any {things}? Explain.",
    "Two {vehicle}s start {100-600} kilometres apart and move towards each other at {30-60} and"
    " {30-90} km/h. When do they meet?",
    "{name} leaves home with ${50-99}, spends ${5-20} on lunch and half of the rest on {things}."
    " How much money remains?",
    "How many seconds are there in {2-12} hours and {5-55} minutes?",
    "Which is larger: {2-9}/{10-19} or {2-9}/{10-19}? Explain how you know.",
    "{name} bought {2-6} {things} for ${3-9} each and sold them for ${10-15} each. What is the"
    " profit?",
    "In {5-20} years {name} will be twice as old as {name2}, who is {4-16} now. How old is {name}"
    " today?",
)
WRITING = (
    "Write a {tone} email to {relation} about {matter}.",
    "Write a {tone} message to {relation} about {matter}. Keep it under 100 words.",
    "Reply to a {tone} email from {relation} about {matter}.",
    "Write the beginning of a short story about {object}.",
    "Tell me a bedtime story about {object} and a child called {name}.",
    "Write a poem about {object}.",
    "Write a four-line rhyme about {season} in {place}.",
    "Write three haikus about {season}.",
    "Write a limerick about {name}, who sells {things}.",
    "Write a review of {product} that you liked, with one thing you would change.",
    "Write a critical review of {product}.",
    "Write a product description for {product}.",
    "Think of five names for a shop that sells {things}, and a slogan for each.",
    "Summarize this text in one sentence:\n\n{lead}",
    "Summarize the following paragraph for a child:\n\n{lead}",
    "Give this text a title and three keywords:\n\n{lead}",
    "Rewrite this text in the style of {style}:\n\n{lead}",
    "Rewrite the following in simpler words:\n\n{lead}",
    "List all names of people and places in this text as JSON with the keys \"people\" and"
    " \"places\":\n\n{lead}",
    "Extract every date or year from this paragraph, with what happened then, as a JSON list:"
    "\n\n{lead}",
    "Read this text and write two questions that it answers:\n\n{lead}",
    "Turn this paragraph into bullet points:\n\n{lead}",
    "Make a table with two columns, term and explanation, from this text:\n\n{lead}",
    "Is this text positive, negative or neutral? Explain briefly.\n\n{lead}",
    "What are the pros and cons of {topic}?",
    "Write a paragraph for and a paragraph against {topic}.",
    "Give me ten tips for beginners in {topic}.",
    "Write a blog post about {topic} with three headings.",
    "Write a {tone} speech about {topic} for a town meeting.",
    "Make a list of seven questions to ask an expert on {topic}.",
    "Write a dialogue between {name} and {name2}, who disagree about {topic}.",
    "Write a letter to the editor about {topic}.",
    "Plan three days in {place} for a family with two children.",
    "Plan a weekend in {place} in {season} on a small budget.",
    "Write a postcard from {place} to {relation}.",
    "Describe a morning in {place} in {season}.",
    "What should I pack for a week in {place} in {season}?",
    "Pretend to be {job}. Describe an ordinary day.",
    "You are {job}. Answer a visitor who asks what the hardest part of the work is.",
    "Act as {job} and introduce yourself to a group of children.",
    "Let us play: you are {job}, and I am a newcomer. Begin the conversation.",
    "Write a diary entry of {job} in {season}.",
    "Write a job advertisement for {job}.",
    "Write a recipe for {dish} with a list of ingredients and numbered steps.",
    "How can I make {dish} for {4-20} guests? Make a plan.",
    "Explain {dish} in the style of {style}.",
    "I have trouble with {problem}. What can I do?",
    "Give a friend advice on {problem} in a {tone} way.",
    "Make a plan for one week against {problem}.",
    "Write an essay of three paragraphs about {idea}.",
    "What have philosophers said about {idea}?",
    "Does {idea} matter more than {idea2}? Discuss.",
    "Write a fable that teaches something about {idea}.",
    "How did {field} change the way people lived or thought?",
    "What connects {field} and {field2}?",
    "Explain the main ideas of {field} to a student.",
    "Write five discussion questions on {field} for a class.",
    "Write a short museum text about {field}.",
    "Write a song verse and a chorus about {object} and {idea}.",
    "Describe {object} in the style of {style}.",
    "Write an invitation from {name} to a party in {season} with a theme of your choice.",
    "Write the opening scene of a play: {name} and {name2} find {object}.",
    "Invent a holiday about {topic}. When is it, and how do people celebrate?",
)
# fmt: on


def fill(template: str, rng: random.Random, extra: dict[str, str]) -> str:
    """Replace the placeholders of a template with random numbers and words."""
    chosen = dict(extra)

    def replace(match: re.Match[str]) -> str:
        key = match[1]
        if "-" in key:
            low, high = map(int, key.split("-"))
            return str(rng.randint(low, high))
        if key not in chosen:
            pool = [word for word in FILLS[key.rstrip("0123456789")] if word not in chosen.values()]
            chosen[key] = rng.choice(pool)
        return chosen[key]

    return re.sub(r"\{([\w-]+)\}", replace, template)


def sequence(rng: random.Random) -> str:
    """Return five numbers that follow a rule, separated by commas."""
    start, step, factor = rng.randint(1, 12), rng.randint(2, 9), rng.randint(2, 3)
    rules: tuple[Callable[[int], int], ...] = (
        lambda i: start + step * i,
        lambda i: start * factor**i,
        lambda i: (start + i) ** 2,
        lambda i: 100 + start - step * i,
        lambda i: start + i * (i + 1) * step // 2,
    )
    rule = rng.choice(rules)
    return ", ".join(str(rule(i)) for i in range(5))


def problems(_: Path, rng: random.Random) -> Prompts:
    """Yield problems of arithmetic and logic; every template is used before any is repeated."""
    while True:
        for template in rng.sample(PROBLEMS, len(PROBLEMS)):
            yield fill(template, rng, {"sequence": sequence(rng)})


def writing(root: Path, rng: random.Random) -> Prompts:
    """Yield requests to write, plan, discuss, or extract information from a text."""
    texts = tuple(lead for lead in leads(root) if 250 <= len(lead) <= 900)
    while True:
        for template in rng.sample(WRITING, len(WRITING)):
            yield fill(template, rng, {"lead": rng.choice(texts)} if texts else {"lead": TEXTS[0]})


@dataclass(frozen=True)
class Kind:
    """Kind of prompt.

    Attributes:
        name: Name of the kind.
        share: Share of all prompts in percent.
        chat: True if prompts are chat messages, False if they are text to continue.
        max_new_tokens: Maximum length of an answer in tokens.
        make: Function that yields prompts, given the text folder and a random generator.
    """

    name: str
    share: int
    chat: bool
    max_new_tokens: int
    make: Callable[[Path, random.Random], Prompts]


KINDS = (
    Kind("function", 22, False, 160, functions),
    Kind("code", 18, False, 128, code),
    Kind("article", 14, False, 128, articles),
    Kind("question", 18, True, 224, questions),
    Kind("task", 12, True, 224, tasks),
    Kind("problem", 8, True, 224, problems),
    Kind("writing", 8, True, 224, writing),
)


def distinct(prompts: Prompts, count: int, seen: set[str]) -> list[str]:
    """Return up to `count` prompts of suitable length that are not in `seen`; add them to it."""
    found: list[str] = []
    for prompt in islice(prompts, 20 * count):
        if len(found) == count:
            break
        if SHORTEST <= len(prompt) <= LONGEST and prompt not in seen:
            seen.add(prompt)
            found.append(prompt)
    return found


def records(root: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Return the records of all prompts, shuffled."""
    made = []
    seen: set[str] = set()
    for kind in KINDS:
        rng = random.Random(f"{seed} {kind.name}")
        wanted = max(1, round(count * kind.share / 100))
        for number, text in enumerate(distinct(kind.make(root, rng), wanted, seen)):
            made.append(_record(kind, number, text))
    random.Random(seed).shuffle(made)
    return made


def _record(kind: Kind, number: int, text: str) -> dict[str, Any]:
    chat = {"messages": [{"role": "user", "content": text}]}
    return {
        "id": f"{kind.name}-{number:05}",
        "kind": kind.name,
        **(chat if kind.chat else {"prompt": text}),
        "max_new_tokens": kind.max_new_tokens,
    }


def main() -> None:
    """Write the prompts and print the number of each kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="folder that fetch_text.py wrote")
    parser.add_argument("out", type=Path, help="JSONL file to write")
    parser.add_argument(
        "--count", type=int, default=2600, metavar="N", help="approximate number of prompts"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args()
    for needed in ("code/codeio/codeio.jsonl", "text/wikipedia/leads.jsonl"):
        if not (options.text / needed).is_file():
            raise SystemExit(f"no {needed} in {options.text}: create it with recipes/fetch_text.py")
    made = records(options.text, options.count, options.seed)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in made]
    partial = options.out.with_name(options.out.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, options.out)
    counts = Counter(record["kind"] for record in made)
    for kind in KINDS:
        print(f"{kind.name}: {counts[kind.name]}")


if __name__ == "__main__":
    main()
