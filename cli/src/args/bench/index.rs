//! What `baton bench index` is asked to do.

#[derive(Debug, clap::Args)]
#[command(
    after_help = "An event stores or removes 32 blocks, a lookup is of 64. Bytes are by membership: a block that a worker holds.
Times are CPU of one thread; p50 and p99 by the clock. Beside them: hashing the tokens of such a prompt, which no lookup can do
without. The last row has prefixes that every worker holds.

Example:
  baton bench index --workers 8,64,512 --blocks 1000000"
)]
pub(crate) struct BenchIndexArgs {
    /// Workers, a row each.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [8, 64, 512], value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) workers: Vec<u32>,
    /// Memberships, about.
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1_000..=4_000_000))]
    pub(crate) blocks: u32,
    /// Workers that hold a shared prefix.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) replicas: u32,
    /// Print one JSON object a row.
    #[arg(long)]
    pub(crate) json: bool,
}
