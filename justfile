# What a developer runs by hand; CI runs the same commands (see .ci/run).

# The whole fleet on this machine.
up *ARGS:
    cargo run --release -- up {{ARGS}}

# Everything that must pass.
test:
    bash integration/test.sh

# One crate's tests, quickly: just t baton-engine
t CRATE:
    cargo nextest run -p {{CRATE}}

lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

deny:
    cargo deny check licenses bans sources

# Transfer figures with the raw limit beside them.
bench:
    cargo run --release -- bench transfer

# Retrains examples/models/tiny (six minutes on one core; needs a Python with torch and transformers).
tiny PYTHON="python3":
    {{PYTHON}} examples/models/train_tiny.py --out examples/models/tiny
