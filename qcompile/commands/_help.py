"""--help with options grouped by topic."""

from __future__ import annotations

import click

# Topic -> options by their names in Python. Options of a command that has more than one topic and
# that are in none of these are under "Options".
TOPICS = {
    "Data": (
        "data", "evaluation", "tokenizer", "samples", "batch_size", "max_length", "text_columns",
        "seed",
    ),
    "Output": ("output", "report_files", "lock_file", "dump_passes", "top", "json_file"),
    "What to build": (
        "target", "mode", "isa", "recipe", "variants", "float16", "pooling", "normalize", "outputs",
        "dims", "fixed", "keep_padding_rows",
    ),
    "Precision and size": (
        "calibrator", "count_padding", "keep_float", "weight_bits", "embedding_bits",
        "weight_block", "max_size", "by", "what", "bits", "lift",
    ),
    "Training": (
        "distill", "max_drop", "epochs", "steps", "train_time", "learning_rate", "range_rate",
        "resume",
    ),
    "Gates (limits that the result must meet)": (
        "min_cosine", "min_worst_cosine", "min_sqnr", "min_r2", "min_single_r2", "max_flips",
        "max_abs", "metric", "min_metric", "max_latency_ratio", "max_size_ratio", "no_verify",
        "no_bench", "force",
    ),
    "Search and tuning": ("search_time", "tune", "pipeline"),
    "Timing": ("streams", "arrival", "rounds", "seconds", "profile"),
    "Hugging Face hub": ("revision", "base_model", "push"),
    "Memory, threads and cache": (
        "max_memory", "threads", "provider", "custom_ops", "cache", "no_cache", "workers",
        "cluster",
    ),
    "Messages": ("quiet", "verbose", "as_json", "help"),
}  # fmt: skip
_TOPIC_OF = {name: topic for topic, names in TOPICS.items() for name in names}
_OTHERS = "Options"
_FEW = 12  # options that are read at a glance, and need no topics


class GroupedCommand(click.Command):
    """A command whose --help lists its options by topic, if it has many."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As in click, but one section for each topic."""
        rows: dict[str, list[tuple[str, str]]] = {topic: [] for topic in (*TOPICS, _OTHERS)}
        own_help = self.get_help_option(ctx)
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None and isinstance(param, click.Option):
                name = "help" if param is own_help else param.name or ""
                rows[_TOPIC_OF.get(name, _OTHERS)].append(row)
        shown = {topic: found for topic, found in rows.items() if found}
        if sum(map(len, shown.values())) <= _FEW:
            shown = {_OTHERS: [row for found in rows.values() for row in found]}
        for topic, found in shown.items():
            with formatter.section(topic):
                formatter.write_dl(found)
