"""A preflight in words, for the terminal and for letters."""

from tasks.preflight import Preflight

_BAR = 24


def preflight_lines(found: Preflight) -> list[str]:
    """Return plain lines; the last one is the forecast."""
    return [
        *_input_lines(found),
        *_row_lines(found),
        *_token_lines(found),
        *_prompt_lines(found),
        *(f"note       {warning}" for warning in found.warnings),
        *_run_lines(found),
    ]


def _input_lines(found: Preflight) -> list[str]:
    files = found.files
    named = files[0]["uri"] if len(files) == 1 else f"{len(files)} files"
    size = sum(file["size"] for file in files)
    lines = [
        f"job        {found.name}",
        f"model      {found.model}",
        f"input      {named}, {found.num_rows:,} rows, {size / 1e6:,.1f} MB",
    ]
    lines += [f"  unreadable: {file['error']}" for file in files if file["error"]]
    lines += [f"  column {column['name']}: {column['type']}" for column in found.schema]
    for index, sample in enumerate(found.samples):
        shown = "; ".join(f"{name}={_one_line(value)}" for name, value in sample.items())
        lines.append(f"  row {index}: {shown}")
    return lines


def _row_lines(found: Preflight) -> list[str]:
    overlong = found.bad_rows_by_state.get("overlong", 0)
    lines = [f"bad rows   {found.num_bad_rows:,} of {found.num_rows:,}"]
    if overlong:
        lines.append(
            f"  {overlong:,} do not fit into max_model_len ({found.max_model_len:,} tokens)"
        )
    for row in found.bad_row_examples:
        lines.append(f"  row {row['row_index']}: {row['state']}: {row['error']}")
    if len(found.bad_row_examples) < found.num_bad_rows:
        lines.append(f"  and {found.num_bad_rows - len(found.bad_row_examples):,} more")
    if found.num_repeated_ids:
        lines.append(f"  {found.num_repeated_ids:,} rows repeat an id of an earlier row")
    if found.num_repeated_prompts:
        lines.append(f"  {found.num_repeated_prompts:,} rows repeat the prompt of an earlier row")
    if found.num_truncated_prompts:
        lines.append(f"  {found.num_truncated_prompts:,} prompts are cut to fit")
    return lines


def _token_lines(found: Preflight) -> list[str]:
    runnable = found.num_rows - found.num_bad_rows
    mean = found.num_prompt_tokens / runnable if runnable else 0.0
    lines = [f"prompts    {found.num_prompt_tokens:,} tokens, {mean:,.0f} on average"]
    highest = max(found.prompt_tokens_histogram.values(), default=1)
    # A plan read back from JSON has its buckets in the order of text.
    buckets = sorted((int(bound), n) for bound, n in found.prompt_tokens_histogram.items())
    for bound, count in buckets:
        bar = "#" * max(1, round(_BAR * count / highest))
        lines.append(f"  up to {bound:>9,} {bar:<{_BAR}} {count:,}")
    lines.append(
        f"prefixes   {100 * found.shared_prefix_share:.1f} % of prompt tokens are shared and need "
        "no prefill"
    )
    return lines


def _prompt_lines(found: Preflight) -> list[str]:
    if found.first_prompt is None:
        return []
    text = [f"  | {line}" for line in found.first_prompt.split("\n")]
    return [f"prompt     of row {found.first_prompt_row}, as the model is given it:", *text]


def _run_lines(found: Preflight) -> list[str]:
    reused = f", {found.num_reused:,} more are copied from earlier runs" if found.num_reused else ""
    rate = found.planning["prompt_tokens_per_s"] or 0.0
    return [
        f"planned    in {found.planning['seconds']:.1f} s, {rate:,.0f} prompt tokens/s",
        f"run        {found.num_sequences:,} completions in {found.num_shards:,} shards{reused}",
        f"hardware   {found.hardware['reason']}",
        f"forecast   {found.forecast.sentence}",
    ]


def _one_line(value: str) -> str:
    text = " ".join(value.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
