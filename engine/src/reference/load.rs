//! From a model directory to packed weights.

use std::path::Path;

use super::checkpoint::{Checkpoint, Tensor, TensorDtype};
use super::config::{Architecture, Configuration};
use super::kernel::Format;
use super::load_error::LoadError;
use super::matrix::{Source, Weights};
use super::model::{Along, Layer, Model};
use super::team::Team;

/// Loads a model: the configuration first, then every tensor's header, then the numbers.
pub(super) fn load(dir: &Path, team: &Team) -> Result<(Configuration, Model), LoadError> {
    let configuration = Configuration::read(dir)?;
    let mut checkpoint = Checkpoint::open(dir)?;
    let plan = Plan::new(&configuration, &mut checkpoint)?;
    let loader = Loader { checkpoint: &checkpoint, team, configuration: &configuration };
    let layers = plan.layers.iter().map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
    let model = Model {
        frequencies: configuration.shape.frequencies(),
        embedding: loader.matrix(&[&plan.embedding])?,
        layers,
        final_norm: Along::new(&loader.vector("model.norm.weight")?),
        head: plan.head.map(|head| loader.matrix(&[&head])).transpose()?,
        shape: configuration.shape.clone(),
    };
    Ok((configuration, model))
}

/// Everything of [`load`] that comes before the numbers.
pub(super) fn inspect(dir: &Path) -> Result<(), LoadError> {
    let configuration = Configuration::read(dir)?;
    Plan::new(&configuration, &mut Checkpoint::open(dir)?).map(|_| ())
}

/// A weight matrix that exists with the right shape.
struct Matrix {
    name: String,
    rows: usize,
    depth: usize,
    dtype: TensorDtype,
}

struct LayerPlan {
    prefix: String,
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

/// Every tensor of the model, checked.
struct Plan {
    embedding: Matrix,
    head: Option<Matrix>,
    layers: Vec<LayerPlan>,
}

impl Plan {
    fn new(configuration: &Configuration, checkpoint: &mut Checkpoint) -> Result<Self, LoadError> {
        let shape = &configuration.shape;
        let embedding = matrix(checkpoint, "model.embed_tokens.weight", shape.vocab, shape.hidden)?;
        checkpoint.expect("model.norm.weight", &[shape.hidden])?;
        let layers = (0..shape.layers)
            .map(|index| LayerPlan::new(configuration, checkpoint, index))
            .collect::<Result<_, _>>()?;
        // As transformers does: weights of its own win over a configuration that ties.
        let head = if !configuration.tied || checkpoint.contains("lm_head.weight") {
            Some(matrix(checkpoint, "lm_head.weight", shape.vocab, shape.hidden)?)
        } else {
            None
        };
        // Old checkpoints carry the rotary frequencies, which follow from the configuration.
        checkpoint.skip(|name| name.ends_with(".rotary_emb.inv_freq"));
        checkpoint.refuse_unexpected()?;
        Ok(Self { embedding, head, layers })
    }
}

impl LayerPlan {
    fn new(
        configuration: &Configuration,
        checkpoint: &mut Checkpoint,
        index: usize,
    ) -> Result<Self, LoadError> {
        let shape = &configuration.shape;
        let prefix = format!("model.layers.{index}");
        let (query, kv) = (shape.query_columns(), shape.kv_columns());
        let mut get =
            |name: &str, rows, depth| matrix(checkpoint, &format!("{prefix}.{name}.weight"), rows, depth);
        let plan = Self {
            query: get("self_attn.q_proj", query, shape.hidden)?,
            key: get("self_attn.k_proj", kv, shape.hidden)?,
            value: get("self_attn.v_proj", kv, shape.hidden)?,
            output: get("self_attn.o_proj", shape.hidden, query)?,
            gate: get("mlp.gate_proj", shape.intermediate, shape.hidden)?,
            up: get("mlp.up_proj", shape.intermediate, shape.hidden)?,
            down: get("mlp.down_proj", shape.hidden, shape.intermediate)?,
            prefix: prefix.clone(),
        };
        let mut vector = |name: &str, len| checkpoint.expect(&format!("{prefix}.{name}"), &[len]).map(|_| ());
        vector("input_layernorm.weight", shape.hidden)?;
        vector("post_attention_layernorm.weight", shape.hidden)?;
        if configuration.qkv_bias {
            vector("self_attn.q_proj.bias", query)?;
            vector("self_attn.k_proj.bias", kv)?;
            vector("self_attn.v_proj.bias", kv)?;
        }
        if configuration.output_bias {
            vector("self_attn.o_proj.bias", shape.hidden)?;
        }
        if configuration.architecture == Architecture::Qwen3 {
            vector("self_attn.q_norm.weight", shape.head_dim)?;
            vector("self_attn.k_norm.weight", shape.head_dim)?;
        }
        Ok(plan)
    }
}

fn matrix(checkpoint: &mut Checkpoint, name: &str, rows: usize, depth: usize) -> Result<Matrix, LoadError> {
    let dtype = checkpoint.expect(name, &[rows, depth])?;
    Ok(Matrix { name: name.to_owned(), rows, depth, dtype })
}

/// Reads and packs what a plan promises.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    team: &'a Team,
    configuration: &'a Configuration,
}

impl Loader<'_> {
    fn layer(&self, plan: &LayerPlan) -> Result<Layer, LoadError> {
        let vector = |name: &str| self.vector(&format!("{}.{name}", plan.prefix));
        let qkv_bias = if self.configuration.qkv_bias {
            let mut bias = vector("self_attn.q_proj.bias")?;
            bias.extend(vector("self_attn.k_proj.bias")?);
            bias.extend(vector("self_attn.v_proj.bias")?);
            Some(bias)
        } else {
            None
        };
        let output_bias = if self.configuration.output_bias {
            Some(Along::new(&vector("self_attn.o_proj.bias")?))
        } else {
            None
        };
        let head_norms = if self.configuration.architecture == Architecture::Qwen3 {
            Some((vector("self_attn.q_norm.weight")?, vector("self_attn.k_norm.weight")?))
        } else {
            None
        };
        Ok(Layer {
            input_norm: Along::new(&vector("input_layernorm.weight")?),
            qkv: self.matrix(&[&plan.query, &plan.key, &plan.value])?,
            qkv_bias,
            head_norms,
            output: self.matrix(&[&plan.output])?,
            output_bias,
            post_norm: Along::new(&vector("post_attention_layernorm.weight")?),
            gate: self.matrix(&[&plan.gate])?,
            up: self.matrix(&[&plan.up])?,
            down: self.matrix(&[&plan.down])?,
        })
    }

    /// Packs matrices of one depth side by side, as bf16 when all of them are.
    fn matrix(&self, parts: &[&Matrix]) -> Result<Weights, LoadError> {
        let all_bf16 = parts.iter().all(|part| part.dtype == TensorDtype::Bf16);
        let format = if all_bf16 { Format::Bf16 } else { Format::F32 };
        let columns = parts.iter().map(|part| part.rows).sum();
        let mut weights = Weights::new(format, parts[0].depth, columns);
        let mut first = 0;
        for part in parts {
            match self.checkpoint.read(&part.name)? {
                Tensor::F32(values) => weights.put(self.team, first, &Source::F32(&values)),
                Tensor::Bf16(bits) => weights.put(self.team, first, &Source::Bf16(&bits)),
            }
            first += part.rows;
        }
        Ok(weights)
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        Ok(self.checkpoint.read(name)?.into_f32())
    }
}
