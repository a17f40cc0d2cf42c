//! safetensors files: one, or several with an index.
//!
//! Read with plain positioned reads rather than mapped: the weights are repacked anyway, and a file that
//! shrinks meanwhile is an error here where it would be a signal under a mapping.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::config::read_json;
use super::load_error::LoadError;

/// Largest header the safetensors format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Number formats of tensors that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TensorDtype {
    F32,
    Bf16,
    F16,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: String,
    shape: Vec<u64>,
    /// Bytes from the start of the file.
    start: u64,
    len: u64,
    taken: bool,
}

/// The open weight files of a model directory.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// The single file or the index: what messages name.
    main: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Entry>,
}

/// A tensor's numbers.
pub(super) enum Tensor {
    F32(Vec<f32>),
    /// Little-endian bits.
    Bf16(Vec<u16>),
}

impl Tensor {
    pub(super) fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(values) => values,
            Self::Bf16(bits) => {
                bits.into_iter().map(|bits| f32::from_bits(u32::from(u16::from_le(bits)) << 16)).collect()
            }
        }
    }
}

/// One tensor in the header of a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the weight files of a directory and checks their headers against their sizes.
    pub(super) fn open(dir: &Path) -> Result<Self, LoadError> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            let mut checkpoint = Self { main: single.clone(), files: Vec::new(), tensors: BTreeMap::new() };
            checkpoint.add(single)?;
            return Ok(checkpoint);
        }
        if !index.exists() {
            return Err(no_weights(dir));
        }
        let Index { weight_map } = read_json(&index)?;
        let mut checkpoint = Self { main: index.clone(), files: Vec::new(), tensors: BTreeMap::new() };
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort();
        names.dedup();
        for name in names {
            if Path::new(name).file_name().is_none_or(|plain| plain != name.as_str()) {
                return Err(LoadError::Damaged {
                    path: index,
                    problem: format!("`{name}` is not a plain file name"),
                });
            }
            checkpoint.add(dir.join(name))?;
        }
        checkpoint.check_index(&weight_map)?;
        Ok(checkpoint)
    }

    /// Every tensor must lie in the file the index gives, and be in the index at all.
    fn check_index(&self, weight_map: &BTreeMap<String, String>) -> Result<(), LoadError> {
        for (name, file) in weight_map {
            let found = self.tensors.get(name).map(|entry| &self.files[entry.file].0);
            if !found.is_some_and(|path| path.ends_with(file)) {
                return Err(LoadError::MissingTensor {
                    name: name.clone(),
                    path: self.main.with_file_name(file),
                    remedy: "the index promises it there; download both again",
                });
            }
        }
        match self.tensors.iter().find(|(name, _)| !weight_map.contains_key(*name)) {
            None => Ok(()),
            Some((name, entry)) => Err(LoadError::Damaged {
                path: self.files[entry.file].0.clone(),
                problem: format!("tensor `{name}` is not in the index"),
            }),
        }
    }

    fn add(&mut self, path: PathBuf) -> Result<(), LoadError> {
        let unreadable = |source| LoadError::Unreadable { path: path.clone(), source };
        let damaged = |problem: String| LoadError::Damaged { path: path.clone(), problem };
        let mut file = File::open(&path).map_err(unreadable)?;
        let size = file.metadata().map_err(unreadable)?.len();
        let mut length = [0; 8];
        if size < 8 {
            return Err(damaged(format!("{size} bytes are no safetensors file (is it a Git LFS pointer?)")));
        }
        file.read_exact(&mut length).map_err(unreadable)?;
        let header_len = u64::from_le_bytes(length);
        if header_len > MAX_HEADER_BYTES || header_len > size - 8 {
            let problem = format!(
                "a header of {header_len} bytes in a file of {size} (cut short, or a Git LFS pointer)"
            );
            return Err(damaged(problem));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header).map_err(unreadable)?;
        let header: BTreeMap<String, Value> =
            serde_json::from_slice(&header).map_err(|error| damaged(format!("its header: {error}")))?;
        let data = 8 + header_len;
        let index = self.files.len();
        let mut ranges = Vec::new();
        for (name, value) in header {
            if name == "__metadata__" {
                continue;
            }
            let Header { dtype, shape, data_offsets: (start, end) } = serde_json::from_value(value)
                .map_err(|error| damaged(format!("tensor `{name}`: {error}")))?;
            if start > end || end > size - data {
                let problem =
                    format!("tensor `{name}` ends at byte {end} of {} (the file is cut short)", size - data);
                return Err(damaged(problem));
            }
            ranges.push((start, end, name.clone()));
            let entry =
                Entry { file: index, dtype, shape, start: data + start, len: end - start, taken: false };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(damaged(format!("tensor `{name}` is also in another file")));
            }
        }
        ranges.sort();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            return Err(damaged(format!("tensors `{}` and `{}` overlap", pair[0].2, pair[1].2)));
        }
        self.files.push((path, file));
        Ok(())
    }

    /// Whether there is a tensor of this name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Checks shape, dtype and size of a tensor and gives its dtype. All of a model is checked before any
    /// memory is taken.
    pub(super) fn expect(&mut self, name: &str, expected: &[usize]) -> Result<TensorDtype, LoadError> {
        let expected: Vec<u64> = expected.iter().map(|n| *n as u64).collect();
        let Some(entry) = self.tensors.get_mut(name) else {
            return Err(LoadError::MissingTensor {
                name: name.to_owned(),
                path: self.main.clone(),
                remedy: "weights and config.json are of different models, or the download is incomplete",
            });
        };
        entry.taken = true;
        let (dtype, size) = match entry.dtype.as_str() {
            "F32" => (TensorDtype::F32, 4),
            "BF16" => (TensorDtype::Bf16, 2),
            "F16" => (TensorDtype::F16, 2),
            other => {
                return Err(LoadError::TensorDtype { name: name.to_owned(), found: other.to_owned() });
            }
        };
        if entry.shape != expected {
            return Err(LoadError::TensorShape {
                name: name.to_owned(),
                expected,
                found: entry.shape.clone(),
            });
        }
        let bytes = expected.iter().try_fold(size, |bytes: u64, n| bytes.checked_mul(*n));
        if bytes != Some(entry.len) {
            let problem = format!("tensor `{name}` of shape {expected:?} takes {} bytes", entry.len);
            return Err(LoadError::Damaged { path: self.files[entry.file].0.clone(), problem });
        }
        Ok(dtype)
    }

    /// Marks a tensor as known and not needed.
    pub(super) fn skip(&mut self, matches: impl Fn(&str) -> bool) {
        for (name, entry) in &mut self.tensors {
            entry.taken |= matches(name);
        }
    }

    /// Refuses a checkpoint with tensors nobody asked for.
    pub(super) fn refuse_unexpected(&self) -> Result<(), LoadError> {
        let mut unexpected = self.tensors.iter().filter(|(_, entry)| !entry.taken);
        match unexpected.next() {
            None => Ok(()),
            Some((name, entry)) => Err(LoadError::UnexpectedTensor {
                name: name.clone(),
                others: unexpected.count(),
                path: self.files[entry.file].0.clone(),
            }),
        }
    }

    /// Reads a tensor that [`Self::expect`] accepted; F16 is widened.
    pub(super) fn read(&self, name: &str) -> Result<Tensor, LoadError> {
        let entry = &self.tensors[name];
        let (path, file) = &self.files[entry.file];
        let mut bytes = vec![0; entry.len as usize];
        file.read_exact_at(&mut bytes, entry.start)
            .map_err(|source| LoadError::Unreadable { path: path.clone(), source })?;
        let halves = |bytes: &[u8]| -> Vec<u16> {
            bytes.as_chunks().0.iter().map(|half| u16::from_ne_bytes(*half)).collect()
        };
        Ok(match entry.dtype.as_str() {
            "BF16" => Tensor::Bf16(halves(&bytes)),
            "F16" => {
                let wide = |half: &[u8; 2]| half::f16::from_le_bytes(*half).to_f32();
                Tensor::F32(bytes.as_chunks().0.iter().map(wide).collect())
            }
            _ => Tensor::F32(bytes.as_chunks().0.iter().map(|number| f32::from_le_bytes(*number)).collect()),
        })
    }
}

/// The message for a directory without weights depends on what lies there instead.
fn no_weights(dir: &Path) -> LoadError {
    let names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    let found = |suffix: &str| names.iter().find(|name| name.ends_with(suffix));
    let remedy = if let Some(name) = found(".gguf").or(found(".bin")).or(found(".pth")).or(found(".pt")) {
        format!("{name} is not read here, save the model with `save_pretrained` of transformers")
    } else if let Some(name) = found(".safetensors") {
        format!("{name} needs an index, or the name model.safetensors")
    } else {
        "give the directory of a Hugging Face checkpoint".to_owned()
    };
    LoadError::NoWeights { dir: dir.to_owned(), remedy }
}
