//! Model directories that must be refused, each with a message that names the thing and the remedy.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{Random, golden_dir};
use crate::reference::{LoadError, Reference};

/// A copy of a golden checkpoint to break.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(golden_dir(name)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn load(&self) -> Result<Reference, LoadError> {
        Reference::load(self.path(), 1)
    }

    fn edit(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let path = self.path().join(file);
        let mut fields: Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut fields);
        fs::write(path, serde_json::to_vec(&fields).unwrap()).unwrap();
    }

    /// Rewrites the header of the weights; the data stay.
    fn edit_header(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        let path = self.path().join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let (length, rest) = bytes.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let mut header: Map<String, Value> = serde_json::from_slice(header).unwrap();
        edit(&mut header);
        let header = serde_json::to_vec(&header).unwrap();
        let parts = [&(header.len() as u64).to_le_bytes(), header.as_slice(), data];
        fs::write(path, parts.concat()).unwrap();
    }
}

fn message(copy: &Copy) -> String {
    match copy.load() {
        Ok(_) => panic!("loaded"),
        Err(error) => error.to_string(),
    }
}

/// Sets a field of `config.json`, and gives what two pieces the message must contain.
fn refused(name: &str, field: &str, value: Value, expected: [&str; 2]) {
    let copy = Copy::of(name);
    copy.edit("config.json", |fields| {
        fields.insert(field.to_owned(), value.clone());
    });
    let message = message(&copy);
    for part in expected {
        assert!(message.contains(part), "{field} = {value}: `{message}` lacks `{part}`");
    }
}

#[test]
fn features_not_computed_are_refused_by_name() {
    for (field, value, expected) in [
        ("architectures", json!(["MistralForCausalLM"]), "Llama, Qwen2 or Qwen3"),
        ("architectures", json!(["LlamaModel"]), "Llama, Qwen2 or Qwen3"),
        ("model_type", json!("mixtral"), "model type"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "rope scaling"),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "rope scaling"),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "rope scaling"),
        ("rope_parameters", json!({"full_attention": {"rope_type": "default"}}), "rope scaling"),
        ("rope_parameters", json!({"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial rotary"),
        ("partial_rotary_factor", json!(0.5), "partial rotary"),
        ("sliding_window", json!(4096), "sliding-window"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "full_attention"),
        ("quantization_config", json!({"quant_method": "gptq"}), "unquantised"),
        ("compression_config", json!({}), "unquantised"),
        ("num_local_experts", json!(8), "mixture of experts"),
        ("num_experts", json!(64), "mixture of experts"),
        ("hidden_act", json!("gelu"), "silu"),
        ("mlp_bias", json!(true), "bias in the MLP"),
        ("attn_logit_softcapping", json!(50.0), "soft-capped"),
        ("vision_config", json!({}), "image"),
        ("is_encoder_decoder", json!(true), "encoder"),
    ] {
        refused("llama-f32", field, value, ["not supported", expected]);
    }
    let window = json!(true);
    refused("qwen3-bf16", "use_sliding_window", json!("yes"), ["`use_sliding_window`", "true or false"]);
    let copy = Copy::of("qwen2-bf16-tied");
    copy.edit("config.json", |fields| {
        fields.remove("layer_types");
        fields.insert("use_sliding_window".into(), window);
        fields.insert("sliding_window".into(), json!(64));
    });
    assert!(message(&copy).contains("sliding-window attention is not supported"), "{}", message(&copy));
}

#[test]
fn impossible_values_are_refused_with_the_field() {
    for (field, value, expected) in [
        ("hidden_size", json!(0), "from 1 to"),
        ("hidden_size", json!(-64), "from 1 to"),
        ("hidden_size", json!(u64::MAX), "from 1 to"),
        ("hidden_size", json!("64"), "from 1 to"),
        ("hidden_size", Value::Null, "is missing"),
        ("num_hidden_layers", json!(1e300), "from 1 to"),
        ("vocab_size", json!(3_000_000_000_u64), "from 1 to"),
        ("num_attention_heads", json!(1_048_576), "wider"),
        ("num_key_value_heads", json!(3), "does not divide"),
        ("head_dim", json!(7), "even"),
        ("head_dim", json!(100_000), "from 1 to"),
        ("max_position_embeddings", json!(1e10), "from 1 to"),
        ("rms_norm_eps", json!(0), "positive"),
        ("rope_theta", json!(7.0), "given twice"),
        ("rope_parameters", json!({"rope_theta": 0.5}), "from 1 to 1e12"),
        ("rope_parameters", json!([1]), "an object"),
        ("tie_word_embeddings", json!(1), "true or false"),
        ("model_type", json!("qwen3"), "correct one"),
        ("architectures", json!([]), "a list of one name"),
    ] {
        refused("llama-f32", field, value, ["config.json", expected]);
    }
    // The end-of-sequence tokens of generation_config.json win.
    let copy = Copy::of("llama-f32");
    copy.edit("generation_config.json", |fields| {
        fields.insert("eos_token_id".into(), json!([2, 88]));
    });
    let message = message(&copy);
    assert!(message.contains("generation_config.json") && message.contains("below 88"), "{message}");
}

#[test]
fn end_of_sequence_tokens() {
    for (generation, config, expected) in [
        (json!([5, 7]), json!(2), &[5, 7][..]),
        (json!(3), json!(2), &[3][..]),
        (Value::Null, json!([2, 4]), &[2, 4][..]),
        (Value::Null, Value::Null, &[][..]),
    ] {
        let copy = Copy::of("llama-f32");
        copy.edit("generation_config.json", |fields| {
            fields.insert("eos_token_id".into(), generation);
        });
        copy.edit("config.json", |fields| {
            fields.insert("eos_token_id".into(), config);
        });
        use crate::executor::Executor;
        assert_eq!(copy.load().unwrap().model().eos, expected);
    }
}

#[test]
fn weights_that_do_not_fit_the_configuration() {
    let copy = Copy::of("llama-f32");
    copy.edit("config.json", |fields| {
        fields.insert("intermediate_size".into(), json!(95));
    });
    assert!(matches!(copy.load(), Err(LoadError::TensorShape { name, .. }) if name.contains("gate_proj")));

    let copy = Copy::of("llama-f32");
    copy.edit("config.json", |fields| {
        fields.insert("num_hidden_layers".into(), json!(3));
    });
    assert!(matches!(copy.load(), Err(LoadError::MissingTensor { name, .. }) if name.contains("layers.2.")));

    let copy = Copy::of("llama-f32");
    copy.edit("config.json", |fields| {
        fields.insert("num_hidden_layers".into(), json!(1));
    });
    assert!(matches!(copy.load(), Err(LoadError::UnexpectedTensor { others: 8, .. })));

    // Biases that the configuration does not announce would be dropped silently.
    let copy = Copy::of("llama-f16-attention-bias-tied");
    copy.edit("config.json", |fields| {
        fields.insert("attention_bias".into(), json!(false));
    });
    assert!(matches!(copy.load(), Err(LoadError::UnexpectedTensor { name, .. }) if name.ends_with("bias")));

    let copy = Copy::of("qwen3-f32-tied");
    copy.edit("config.json", |fields| {
        fields.insert("tie_word_embeddings".into(), json!(false));
    });
    assert!(matches!(copy.load(), Err(LoadError::MissingTensor { name, .. }) if name == "lm_head.weight"));
}

#[test]
fn weight_files_with_a_wrong_header() {
    let first = "model.embed_tokens.weight";
    let with = |edit: fn(&mut Value)| {
        let copy = Copy::of("llama-f32");
        copy.edit_header(|header| edit(&mut header[first]));
        copy.load().map(|_| ()).unwrap_err()
    };
    let dtype = with(|tensor| tensor["dtype"] = json!("F8_E4M3"));
    assert!(matches!(&dtype, LoadError::TensorDtype { found, .. } if found == "F8_E4M3"), "{dtype}");
    let shape = with(|tensor| tensor["shape"] = json!([64, 88]));
    assert!(matches!(shape, LoadError::TensorShape { .. }), "{shape}");
    for (edit, expected) in [
        (
            (|tensor| {
                let start = tensor["data_offsets"][0].as_u64().unwrap();
                tensor["data_offsets"][1] = json!(start + 4);
            }) as fn(&mut Value),
            "takes 4 bytes",
        ),
        (|tensor| tensor["data_offsets"] = json!([8, 4]), "cut short"),
        (|tensor| tensor["data_offsets"] = json!([0, u64::MAX]), "cut short"),
        (|tensor| tensor["data_offsets"] = json!([-1, 4]), "invalid value"),
        (|tensor| tensor["shape"] = json!("many"), "invalid type"),
        (|tensor| tensor["stride"] = json!([1]), "unknown field"),
    ] {
        let error = with(edit);
        let text = error.to_string();
        assert!(matches!(error, LoadError::Damaged { .. }) && text.contains(expected), "{text}");
        assert!(text.contains(first) || text.contains("model.safetensors"), "{text}");
    }
    let copy = Copy::of("llama-f32");
    copy.edit_header(|header| {
        let other = header["model.norm.weight"]["data_offsets"].clone();
        header["model.layers.0.input_layernorm.weight"]["data_offsets"] = other;
    });
    assert!(message(&copy).contains("overlap"), "{}", message(&copy));
}

#[test]
fn files_that_are_cut_or_absent() {
    let copy = Copy::of("llama-f32");
    let weights = copy.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    for keep in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&weights, &whole[..keep]).unwrap();
        let error = copy.load().map(|_| ()).unwrap_err();
        assert!(
            matches!(&error, LoadError::Damaged { path, .. } if *path == weights),
            "{keep} bytes: {error}"
        );
    }
    fs::write(&weights, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n").unwrap();
    assert!(message(&copy).contains("Git LFS pointer"), "{}", message(&copy));
    fs::write(&weights, [u64::MAX.to_le_bytes(), [0; 8]].concat()).unwrap();
    assert!(message(&copy).contains("header"), "{}", message(&copy));
    fs::remove_file(&weights).unwrap();
    assert!(matches!(copy.load(), Err(LoadError::NoWeights { .. })));
    fs::write(copy.path().join("pytorch_model.bin"), b"").unwrap();
    assert!(message(&copy).contains("save_pretrained"), "{}", message(&copy));
    fs::write(copy.path().join("config.json"), b"{\"hidden_size\": ").unwrap();
    assert!(matches!(copy.load(), Err(LoadError::Damaged { .. })));
    fs::remove_file(copy.path().join("config.json")).unwrap();
    assert!(matches!(copy.load(), Err(LoadError::Unreadable { path, .. }) if path.ends_with("config.json")));
}

#[test]
fn indexes_that_lie() {
    let index = "model.safetensors.index.json";
    let with = |edit: &dyn Fn(&mut Map<String, Value>)| {
        let copy = Copy::of("llama-bf16-sharded");
        copy.edit(index, |fields| edit(fields["weight_map"].as_object_mut().unwrap()));
        copy.load().map(|_| ()).unwrap_err()
    };
    let error = with(&|map| {
        map.insert("model.norm.weight".into(), json!("../elsewhere.safetensors"));
    });
    assert!(error.to_string().contains("not a plain file name"), "{error}");
    let error = with(&|map| {
        map.insert("model.norm.weight".into(), json!("model-00009-of-00001.safetensors"));
    });
    assert!(matches!(error, LoadError::Unreadable { .. }), "{error}");
    let error = with(&|map| {
        map.remove("model.norm.weight");
    });
    assert!(error.to_string().contains("not in the index"), "{error}");
    let error = with(&|map| {
        let other = map["model.embed_tokens.weight"].clone();
        assert_ne!(map["model.norm.weight"], other, "the golden has several shards");
        map.insert("model.norm.weight".into(), other);
    });
    assert!(matches!(error, LoadError::MissingTensor { .. }), "{error}");
}

#[test]
fn random_damage_never_panics() {
    let (mut refused, mut loaded) = (0, 0);
    for seed in 1..=300 {
        let mut random = Random(seed);
        let copy = Copy::of(random.pick(&["llama-f32", "qwen3-bf16", "llama-bf16-sharded"]));
        let mut names: Vec<_> = fs::read_dir(copy.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| !path.ends_with("golden.safetensors"))
            .collect();
        names.sort();
        let path = &names[random.below(names.len())];
        let mut bytes = fs::read(path).unwrap();
        match random.below(3) {
            0 => bytes.truncate(random.below(bytes.len())),
            // Headers and JSON lie at the start: that is where damage is interesting.
            kind => {
                for _ in 0..kind * 2 {
                    let at = random.below(bytes.len().min(3000));
                    bytes[at] = random.pick(&[b'0', b'9', b'"', b'[', b'}', b',', 0, 0xff]);
                }
            }
        }
        fs::write(path, bytes).unwrap();
        match copy.load() {
            Ok(_) => loaded += 1,
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty(), "seed {seed}");
            }
        }
    }
    assert!(
        refused > 150 && loaded > 0,
        "{refused} refused, {loaded} loaded: the damage is too much or too little"
    );
}
