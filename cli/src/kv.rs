//! `baton kv`: how much KV cache a model needs and how long moving it takes.

use baton_config::model_shape::{ModelShape, ModelShapeError};
use baton_config::{Bytes, Dtype, KvGeometry, KvLayout};
use serde::Serialize;

use crate::args::KvArgs;
use crate::failure::{Failure, chain};
use crate::output;
use crate::table::columns;

/// Block sizes in use by engines, in tokens.
const BLOCKS: [u32; 4] = [16, 32, 64, 128];
/// Prompt lengths shown, in tokens.
const PROMPTS: [u32; 5] = [128, 512, 2_048, 8_192, 32_768];
/// Links: name and bytes per second of the line, before protocol overhead.
const LINKS: [(&str, f64); 6] = [
    ("10 Gbit/s", 1.25e9),
    ("25 Gbit/s", 3.125e9),
    ("100 Gbit/s", 12.5e9),
    ("400 Gbit/s", 50e9),
    ("PCIe 4 x16", 31.5e9),
    ("memory 10 GB/s", 10e9),
];

#[derive(Debug, Serialize)]
struct KvReport {
    architecture: String,
    layers: u32,
    kv_heads: u32,
    head_dim: u32,
    max_context_tokens: u32,
    dtypes: Vec<DtypeReport>,
}

#[derive(Debug, Serialize)]
struct DtypeReport {
    dtype: Dtype,
    bytes_per_token: u64,
    bytes_per_block: Vec<BlockReport>,
    transfers: Vec<TransferReport>,
}

#[derive(Debug, Serialize)]
struct BlockReport {
    block_tokens: u32,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct TransferReport {
    prompt_tokens: u32,
    bytes: u64,
    link: &'static str,
    link_bytes_per_s: f64,
    ms: f64,
}

pub(crate) fn run(args: &KvArgs) -> Result<(), Failure> {
    let shape = ModelShape::read(&args.model_dir).map_err(|error| {
        let remedy = match &error {
            ModelShapeError::Missing { .. } | ModelShapeError::NotADirectory { .. } => {
                "; give a Hugging Face model directory, like examples/models/tiny"
            }
            _ => "",
        };
        Failure::Usage(format!("{}{remedy}", chain(&error)))
    })?;
    let report = report(&shape);
    if args.json {
        let json = serde_json::to_string(&report)
            .map_err(|error| Failure::because("the report cannot be written as JSON", &error))?;
        return output::print(&format!("{json}\n"));
    }
    output::print(&describe(&report))
}

fn report(shape: &ModelShape) -> KvReport {
    let dtypes = [Dtype::Bf16, Dtype::F32].map(|dtype| {
        let geometry = |block_tokens| KvGeometry {
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            block_tokens,
            layout: KvLayout::Nhd,
            dtype,
            ..KvGeometry::PLAIN
        };
        let per_token = geometry(1).token_bytes().0;
        let block =
            |tokens| BlockReport { block_tokens: tokens, bytes: geometry(tokens).block_bytes() as u64 };
        let transfer = |tokens: u32, (link, speed): (&'static str, f64)| {
            let bytes = per_token * u64::from(tokens);
            let ms = bytes as f64 / speed * 1e3;
            TransferReport { prompt_tokens: tokens, bytes, link, link_bytes_per_s: speed, ms }
        };
        DtypeReport {
            dtype,
            bytes_per_token: per_token,
            bytes_per_block: BLOCKS.map(block).into(),
            transfers: PROMPTS
                .into_iter()
                .flat_map(|tokens| LINKS.map(|link| transfer(tokens, link)))
                .collect(),
        }
    });
    KvReport {
        architecture: shape.architecture.clone(),
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        max_context_tokens: shape.max_context,
        dtypes: dtypes.into(),
    }
}

fn describe(report: &KvReport) -> String {
    let KvReport { architecture, layers, kv_heads, head_dim, max_context_tokens, dtypes } = report;
    let mut out = format!(
        "{architecture}: {layers} layers x {kv_heads} kv heads x {head_dim} dims, context of {max_context_tokens} tokens\n"
    );
    for DtypeReport { dtype, bytes_per_token, bytes_per_block, transfers } in dtypes {
        out.push_str(&format!("\n{dtype}: {} per token;", Bytes(*bytes_per_token)));
        for block in bytes_per_block {
            out.push_str(&format!(" {} per block of {},", Bytes(block.bytes), block.block_tokens));
        }
        out.pop();
        out.push_str("\n\n");
        let mut head = vec!["PROMPT".to_owned(), "KV CACHE".to_owned()];
        head.extend(LINKS.iter().map(|(name, _)| (*name).to_owned()));
        let mut rows = vec![head];
        for prompt in transfers.chunks(LINKS.len()) {
            let Some(first) = prompt.first() else { continue };
            let mut row = vec![format!("{} tokens", first.prompt_tokens), Bytes(first.bytes).to_string()];
            row.extend(prompt.iter().map(|transfer| duration(transfer.ms)));
            rows.push(row);
        }
        out.push_str(&columns(&rows));
    }
    out.push_str("\nTimes are of the bare line; real links reach 60 to 95 % of it.\n");
    out
}

fn duration(ms: f64) -> String {
    match ms {
        _ if ms < 1.0 => format!("{:.1} us", ms * 1e3),
        _ if ms < 1e3 => format!("{ms:.1} ms"),
        _ => format!("{:.2} s", ms / 1e3),
    }
}
