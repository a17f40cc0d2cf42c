//! `config.json` and `generation_config.json`: what is computed, and refusal of what is not.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::load_error::LoadError;
use super::model::Shape;

/// Largest JSON file read; real ones take a few KiB (index files of large models a few hundred).
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Bounds of sizes, far above any model this engine could run, that keep all arithmetic on them from
/// overflowing.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_LAYERS: u64 = 1 << 12;
/// Head dimensions in use are 16 to 256.
const MAX_HEAD_DIM: u64 = 512;

/// The architectures computed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

impl Architecture {
    const ALL: [(Self, &str, &str); 3] = [
        (Self::Llama, "llama", "LlamaForCausalLM"),
        (Self::Qwen2, "qwen2", "Qwen2ForCausalLM"),
        (Self::Qwen3, "qwen3", "Qwen3ForCausalLM"),
    ];
}

/// A checked configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Configuration {
    pub(super) architecture: Architecture,
    pub(super) shape: Shape,
    pub(super) max_context: u32,
    pub(super) eos: Vec<u32>,
    /// Whether the output projection is the embedding unless the weights hold one of their own.
    pub(super) tied: bool,
    /// Biases of the query, key and value projections.
    pub(super) qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub(super) output_bias: bool,
}

impl Configuration {
    /// Reads the configuration of a model directory.
    pub(super) fn read(dir: &Path) -> Result<Self, LoadError> {
        let path = dir.join("config.json");
        let fields: Map<String, Value> = read_json(&path)?;
        let reader = Fields { path: path.clone(), fields: &fields };
        let architecture = reader.architecture()?;
        reader.refuse_unsupported()?;
        let shape = reader.shape()?;
        let qwen2 = architecture == Architecture::Qwen2;
        let attention_bias = reader.flag("attention_bias")?;
        if qwen2 && attention_bias == Some(false) {
            return Err(reader.unsupported(
                "a qwen2 model without attention bias",
                "attention_bias",
                "remove the field: transformers gives qwen2 its biases whatever the field says",
            ));
        }
        let attention_bias = attention_bias.unwrap_or(false);
        let max_context =
            reader.number("max_position_embeddings", u64::from(u32::MAX))?.unwrap_or(2048) as u32;
        Ok(Self {
            architecture,
            max_context,
            eos: reader.eos(dir, shape.vocab)?,
            tied: reader.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: qwen2 || attention_bias,
            output_bias: !qwen2 && attention_bias,
            shape,
        })
    }
}

/// Reads a JSON file of bounded size.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, LoadError> {
    let unreadable = |source| LoadError::Unreadable { path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
    let damaged = |problem| LoadError::Damaged { path: path.to_owned(), problem };
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(damaged(format!("larger than {MAX_JSON_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))
}

/// The fields of `config.json`, a `null` counting as absent.
struct Fields<'a> {
    path: PathBuf,
    fields: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn wrong(&self, field: &str, problem: impl Into<String>) -> LoadError {
        LoadError::Field { path: self.path.clone(), field: field.to_owned(), problem: problem.into() }
    }

    fn unsupported(&self, feature: &'static str, field: &str, remedy: &'static str) -> LoadError {
        let value = self.fields.get(field).map(short).unwrap_or_default();
        LoadError::Unsupported {
            feature,
            found: format!("`{field}`: {value} in {}", self.path.display()),
            remedy,
        }
    }

    /// A positive whole number of at most `most`.
    fn number(&self, field: &str, most: u64) -> Result<Option<u64>, LoadError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if (1..=most).contains(&number) => Ok(Some(number)),
            _ => Err(self
                .wrong(field, format!("is {}, but must be a whole number from 1 to {most}", short(value)))),
        }
    }

    fn required(&self, field: &str, most: u64) -> Result<u64, LoadError> {
        self.number(field, most)?.ok_or_else(|| self.wrong(field, "is missing"))
    }

    fn flag(&self, field: &str) -> Result<Option<bool>, LoadError> {
        self.get(field)
            .map(|value| {
                value.as_bool().ok_or_else(|| {
                    self.wrong(field, format!("is {}, but must be true or false", short(value)))
                })
            })
            .transpose()
    }

    fn positive(&self, field: &str, value: &Value) -> Result<f64, LoadError> {
        value
            .as_f64()
            .filter(|number| *number > 0.0 && number.is_finite())
            .ok_or_else(|| self.wrong(field, format!("is {}, but must be a positive number", short(value))))
    }

    fn architecture(&self) -> Result<Architecture, LoadError> {
        const REMEDY: &str = "use a checkpoint of Llama, Qwen2 or Qwen3 architecture";
        let listed = match self.get("architectures") {
            None => None,
            Some(Value::Array(names)) if names.len() == 1 && names[0].is_string() => names[0].as_str(),
            Some(_) => return Err(self.wrong("architectures", "must be a list of one name")),
        };
        let model_type = match self.get("model_type") {
            None => None,
            Some(Value::String(name)) => Some(name.as_str()),
            Some(_) => return Err(self.wrong("model_type", "must be a name")),
        };
        let by_list = listed.map(|name| Architecture::ALL.iter().find(|known| known.2 == name));
        let by_type = model_type.map(|name| Architecture::ALL.iter().find(|known| known.1 == name));
        match (by_list, by_type) {
            (None, None) => Err(self.wrong("model_type", "is missing, and so is `architectures`")),
            (Some(None), _) => Err(self.unsupported("this architecture", "architectures", REMEDY)),
            (_, Some(None)) => Err(self.unsupported("this model type", "model_type", REMEDY)),
            (Some(Some(a)), Some(Some(b))) if a.0 != b.0 => {
                Err(self
                    .wrong("model_type", format!("is {} but `architectures` says {}: correct one", b.1, a.2)))
            }
            (Some(Some(known)), _) | (None, Some(Some(known))) => Ok(known.0),
        }
    }

    /// Refuses every feature known to change what the model computes.
    fn refuse_unsupported(&self) -> Result<(), LoadError> {
        const OTHER: &str = "use a checkpoint without it";
        if self.get("quantization_config").is_some() || self.get("compression_config").is_some() {
            let remedy = "use the unquantised checkpoint (F32, BF16 or F16 weights)";
            let field = ["quantization_config", "compression_config"]
                [usize::from(self.get("quantization_config").is_none())];
            return Err(self.unsupported("quantisation", field, remedy));
        }
        let experts = ["num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"];
        if let Some(field) = experts.into_iter().find(|field| self.get(field).is_some()) {
            return Err(self.unsupported("mixture of experts", field, "use a dense checkpoint"));
        }
        for (field, accepted) in [("hidden_act", "silu"), ("hidden_activation", "silu")] {
            if self.get(field).is_some_and(|value| value != accepted && value != "swish") {
                return Err(self.unsupported("an activation other than silu", field, OTHER));
            }
        }
        if self.flag("mlp_bias")? == Some(true) {
            return Err(self.unsupported("bias in the MLP", "mlp_bias", OTHER));
        }
        let present = [
            ("attn_logit_softcapping", "soft-capped attention"),
            ("final_logit_softcapping", "soft-capped logits"),
            ("query_pre_attn_scalar", "another attention scale"),
            ("attention_multiplier", "another attention scale"),
            ("logit_scale", "scaled logits"),
            ("logits_scaling", "scaled logits"),
            ("embedding_multiplier", "scaled embeddings"),
            ("residual_multiplier", "scaled residuals"),
            ("no_rope_layers", "layers without rotary embedding"),
            ("no_rope_layer_interval", "layers without rotary embedding"),
            ("kv_lora_rank", "latent attention"),
            ("attention_chunk_size", "chunked attention"),
            ("vision_config", "image input"),
            ("audio_config", "audio input"),
            ("text_config", "a nested text model"),
        ];
        if let Some((field, feature)) = present.into_iter().find(|(field, _)| self.get(field).is_some()) {
            return Err(self.unsupported(feature, field, OTHER));
        }
        if self.flag("is_encoder_decoder")? == Some(true) {
            return Err(self.unsupported("an encoder", "is_encoder_decoder", OTHER));
        }
        self.refuse_sliding_window()
    }

    /// Qwen writes `sliding_window` into every configuration and `use_sliding_window: false` beside it.
    fn refuse_sliding_window(&self) -> Result<(), LoadError> {
        const REMEDY: &str = "use a checkpoint with full attention in all layers";
        if let Some(kinds) = self.get("layer_types") {
            let full = |kind: &Value| kind == "full_attention";
            if !kinds.as_array().is_some_and(|kinds| kinds.iter().all(full)) {
                return Err(self.unsupported(
                    "a layer type other than full_attention",
                    "layer_types",
                    REMEDY,
                ));
            }
        }
        let off = match self.flag("use_sliding_window")? {
            Some(used) => !used,
            None => self.get("model_type").is_some_and(|kind| kind == "qwen2" || kind == "qwen3"),
        };
        if self.get("sliding_window").is_some() && !off && self.get("layer_types").is_none() {
            return Err(self.unsupported("sliding-window attention", "sliding_window", REMEDY));
        }
        Ok(())
    }

    fn shape(&self) -> Result<Shape, LoadError> {
        let hidden = self.required("hidden_size", MAX_WIDTH)?;
        let heads = self.required("num_attention_heads", MAX_WIDTH)?;
        let kv_heads = self.number("num_key_value_heads", MAX_WIDTH)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            let problem = format!("is {kv_heads}, which does not divide the {heads} attention heads");
            return Err(self.wrong("num_key_value_heads", problem));
        }
        let head_dim = match self.number("head_dim", MAX_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            // transformers gives Qwen3 heads of 128 unless told otherwise.
            None if self.architecture()? == Architecture::Qwen3 => 128,
            None if hidden % heads != 0 => {
                let problem = format!("is {hidden}, which {heads} attention heads do not divide");
                return Err(self.wrong("hidden_size", problem));
            }
            None => hidden / heads,
        };
        if head_dim % 2 != 0 || head_dim > MAX_HEAD_DIM {
            let problem = format!("is {head_dim}, but must be even and at most {MAX_HEAD_DIM}");
            return Err(self.wrong("head_dim", problem));
        }
        if heads * head_dim > MAX_WIDTH {
            let problem = format!("is {heads}, with heads of {head_dim} wider than {MAX_WIDTH}");
            return Err(self.wrong("num_attention_heads", problem));
        }
        let epsilon =
            self.get("rms_norm_eps").map_or(Ok(1e-6), |value| self.positive("rms_norm_eps", value))?;
        Ok(Shape {
            vocab: self.required("vocab_size", MAX_VOCAB)? as usize,
            hidden: hidden as usize,
            intermediate: self.required("intermediate_size", MAX_WIDTH)? as usize,
            layers: self.required("num_hidden_layers", MAX_LAYERS)? as usize,
            heads: heads as usize,
            kv_heads: kv_heads as usize,
            head_dim: head_dim as usize,
            epsilon: epsilon as f32,
            rope_theta: self.rope_theta()?,
        })
    }

    /// The rotary base from `rope_parameters` or `rope_theta`; any scaling of the rotation is refused.
    fn rope_theta(&self) -> Result<f64, LoadError> {
        const REMEDY: &str =
            "use a checkpoint without it (rope_type `default`); without scaling the positions would be wrong";
        let mut theta = self.get("rope_theta").map(|value| self.positive("rope_theta", value)).transpose()?;
        for field in ["rope_parameters", "rope_scaling"] {
            let Some(value) = self.get(field) else { continue };
            let Some(parameters) = value.as_object() else {
                return Err(self.wrong(field, format!("is {}, but must be an object", short(value))));
            };
            for (key, value) in parameters {
                match key.as_str() {
                    "rope_theta" => {
                        let inner = self.positive("rope_theta", value)?;
                        if theta.is_some_and(|outer| outer != inner) {
                            let problem = format!(
                                "is given twice, the second time in `{field}` as {inner}: remove one"
                            );
                            return Err(self.wrong("rope_theta", problem));
                        }
                        theta = Some(inner);
                    }
                    "rope_type" | "type" if value == "default" => {}
                    "rope_type" | "type" => return Err(self.unsupported("rope scaling", field, REMEDY)),
                    "partial_rotary_factor" if value.as_f64() == Some(1.0) => {}
                    "partial_rotary_factor" => {
                        return Err(self.unsupported("partial rotary embedding", field, REMEDY));
                    }
                    _ => return Err(self.unsupported("rope scaling", field, REMEDY)),
                }
            }
        }
        if self.get("partial_rotary_factor").is_some_and(|value| value.as_f64() != Some(1.0)) {
            return Err(self.unsupported("partial rotary embedding", "partial_rotary_factor", REMEDY));
        }
        let theta = theta.unwrap_or(10_000.0);
        if (1.0..=1e12).contains(&theta) {
            Ok(theta)
        } else {
            Err(self.wrong("rope_theta", format!("is {theta}, but must be from 1 to 1e12")))
        }
    }

    /// End-of-sequence tokens: those of `generation_config.json` where it has any, else of `config.json`.
    fn eos(&self, dir: &Path, vocab: usize) -> Result<Vec<u32>, LoadError> {
        #[derive(Deserialize)]
        struct Generation {
            eos_token_id: Option<Value>,
        }
        let path = dir.join("generation_config.json");
        let generation = match path.try_exists() {
            Ok(true) => read_json::<Generation>(&path)?.eos_token_id,
            Ok(false) => None,
            Err(source) => return Err(LoadError::Unreadable { path, source }),
        };
        let (path, value) = match (generation, self.get("eos_token_id")) {
            (Some(value), _) => (path, value),
            (None, Some(value)) => (self.path.clone(), value.clone()),
            (None, None) => return Ok(Vec::new()),
        };
        let ids = match &value {
            Value::Array(ids) => ids.iter().collect(),
            one => vec![one],
        };
        ids.into_iter()
            .map(|id| {
                id.as_u64().filter(|id| *id < vocab as u64).map(|id| id as u32).ok_or_else(|| {
                    LoadError::Field {
                        path: path.clone(),
                        field: "eos_token_id".to_owned(),
                        problem: format!("is {}, but token ids of this model are below {vocab}", short(id)),
                    }
                })
            })
            .collect()
    }
}

/// A JSON value for a message: cut when it is long.
fn short(value: &Value) -> String {
    const MOST: usize = 120;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text,
    }
}
