"""Compares optimizers by training nanoGPT, with the same effort for each.

`protocol.toml` fixes everything before any run, `arms.py` says what is compared,
`tune.py` how each is tuned, `run.py` trains, `evidence.py` judges differences, and
`report.py` makes tables and plots. `search.py` looks for better chains, and `claims.py`
trains what answers claims about norms and spectra.

    python -m benchmarks.convergence.run tiny-250 --out RUNS.jsonl --arms muon halley
    python -m benchmarks.convergence.report RUNS.jsonl
"""
