"""Experiments: a TOML file in, one JSON a run out, and a report from those alone.

How to add a kind of experiment: one module here with a frozen dataclass that follows
`kind.Kind`, and one line in `registry.KINDS`. In short:

- ``runs(table)`` reads its own keys off the ``[[experiment]]`` table (`table.Table`; keys
  that are not there are looked up at the file's top level; a key nobody asked for is
  refused) and gives one `spec.Run` for each JSON to be written. ``table.codecs()`` expands
  ``[[codec]]`` entries and ``ratios``. What a run needs beyond codec, text, context and
  continuation goes into ``Run.settings``: plain JSON values, part of the run's digest.
  Without compression is the codec ``raw``.
- ``work(run)`` says how many tokens go through the model, about, for the progress bar.
- ``measure(run, bench, done)`` gives a JSON object of metrics. `bench.Bench` has the model,
  texts and calibrations: ``bench.tokens(text, count)``, ``bench.prepared(run, done)`` (kept
  while runs of the same text and lengths follow each other), ``bench.capture(tokens, done)``
  (prefill and snapshot), ``bench.coded(codec, snapshot, (0, T))`` (through the codec, also
  where a ratio is asked for and the option has to be found), ``bench.restored(snapshot,
  pages)`` (a cache that the model continues from). Errors are those of `kvferry.errors`:
  one of them makes the run a failed one, and the others go on.
- ``section(results, folder)`` gives lines of Markdown for the report, and draws its PNG
  files into ``folder``. It sees this kind's results (`results.Result`), whatever files and
  machines they are from, and says what is missing.
"""
