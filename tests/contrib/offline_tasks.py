"""Evaluation tasks and requests that need no network, for the harness with Hugging Face's model and with cutp's.

Needs neither of them: tasks are dicts as the harness takes them, whose data is here.
"""

_QUESTIONS = [
    ("Once upon a time there was a king who had three", [" daughters", " sons and", " elephants in a box"], 0),
    ("The wolf said to the little", [" pig", " red riding hood", " of the"], 1),
    ("", ["The king", "A queen lived in the forest."], 0),
    ("She went into the ", ["forest", "wood", "kitchen to fetch water"], 1),
]
_TEXTS = [
    "There was once a poor widow who lived in a lonely cottage.",
    "The king\u2019s daughter \u2014 a beautiful child \u2014 said: \u201cCome in!\u201d\n",
    "a",
    "In old times, when wishing still helped, there lived a king. " * 30,
]
_BEGINNINGS = ["Once upon a time", "The wolf said:", "There was a poor man who had twelve children,", "The end"]


def _documents(**columns):
    """A function that gives the harness its data, as one split."""
    def load(**_):
        from datasets import Dataset

        return {"test": Dataset.from_dict(columns)}

    return load


TASKS = [
    {"task": "tales_choice", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}",
     "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
     "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
     "custom_dataset": _documents(question=[q for q, _, _ in _QUESTIONS], choices=[c for _, c, _ in _QUESTIONS],
                                  answer=[a for _, _, a in _QUESTIONS])},
    {"task": "tales_rolling", "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "",
     "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
     "custom_dataset": _documents(text=_TEXTS)},
    {"task": "tales_until", "output_type": "generate_until", "test_split": "test", "doc_to_text": "{{text}}",
     "doc_to_target": "{{text}}", "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24, "do_sample": False},
     "metric_list": [{"metric": "exact_match"}], "custom_dataset": _documents(text=_BEGINNINGS)},
]

# Requests below the level of tasks, by the context length that the model is given; None is its own.
MAX_LENGTHS = (None, 48, 9)
PAIRS = [
    ("The king", " of the"), ("The king ", "of the"), ("The king  ", " of the"), ("", "rain"), ("", " rain fell"),
    ("<s>The king", " of the"), ("a", "\n"), ("The wolf and the ", "fox"), (" ", "fox"),
    ("Once upon a time there was a king. " * 20, "He had a daughter."), ("One day ", "the cat met the mouse again"),
]
ROLLING = [*_TEXTS, "<s>Once upon a time", "word " * 47, "word " * 48, "word " * 49]
GENERATION = [
    ("Once upon a time", {"until": ["."], "max_gen_toks": 5}),
    ("Once upon a time", {"until": ",", "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}),
    ("The wolf said", {"until": [], "max_gen_toks": 7}),
    ("Once upon a time there was a king. " * 20, {"until": [" the", " was"], "max_gen_toks": 8, "temperature": 0.0}),
    ("<s>The end", {"max_new_tokens": 8}),
    ("The king", {"until": ["\n\n"], "max_gen_toks": 4, "repetition_penalty": 1.3}),
]
