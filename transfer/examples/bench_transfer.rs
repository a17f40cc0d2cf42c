//! Measures transfers between two processes: `cargo run --release --example bench_transfer`.
//!
//! Optional arguments: seconds per shape, TCP streams, a backend, a shape such as `64x4096`, an operation.
#![expect(clippy::print_stdout, reason = "an example talks to its user")]

use std::time::Duration;

use baton_transfer::bench;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "peer") {
        return Ok(bench::serve_peer().await?);
    }
    let mut options = bench::BenchOptions::new(vec!["peer".into()]);
    if let Some(seconds) = arguments.first() {
        options.time_per_shape = Duration::from_secs_f64(seconds.parse()?);
    }
    if let Some(streams) = arguments.get(1) {
        options.streams = streams.parse()?;
    }
    if let Some(backend) = arguments.get(2) {
        options.backends.retain(|known| known.as_str() == backend);
    }
    if let Some((blocks, block_bytes)) = arguments.get(3).and_then(|shape| shape.split_once('x')) {
        options.shapes = vec![bench::Shape { blocks: blocks.parse()?, block_bytes: block_bytes.parse()? }];
    }
    if let Some(op) = arguments.get(4) {
        options.ops.retain(|known| known.as_str() == op);
    }
    println!(
        "{:9} {:5} {:>15} {:9} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>6}",
        "backend",
        "op",
        "blocks x bytes",
        "integrity",
        "p50 us",
        "p99 us",
        "GB/s",
        "cpu s/GB",
        "of raw",
        "raw us",
        "ratio"
    );
    let report = bench::run(options).await?;
    for row in &report.rows {
        println!(
            "{:9} {:5} {:4} x {:8} {:9} {:9.1} {:9.1} {:8.2} {:8.3} {:8.3} {:9.1} {:6.2}",
            row.backend,
            row.op,
            row.blocks,
            row.block_bytes,
            row.integrity,
            row.p50_us,
            row.p99_us,
            row.gb_per_s,
            row.cpu_s_per_gb,
            row.raw_cpu_s_per_gb,
            row.raw_p50_us,
            row.ratio
        );
    }
    for skipped in &report.skipped {
        println!("{}: {}", skipped.backend, skipped.reason);
    }
    report.failure.map_or(Ok(()), |error| Err(error.into()))
}
