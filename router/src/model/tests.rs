use std::path::Path;

use super::*;

#[path = "../../tests/support/model_dir.rs"]
pub(crate) mod model_dir;

fn options(path: &Path) -> ModelOptions {
    ModelOptions {
        id: "tiny".to_owned(),
        served_as: vec!["tiny".to_owned(), "other".to_owned()],
        path: path.to_owned(),
        max_context: None,
    }
}

fn user(content: &str) -> Message {
    Message { role: "user", content: content.to_owned(), name: None }
}

/// A fixture with one file replaced, or taken away.
fn spoiled(file: &str, content: Option<&str>) -> Result<Model, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    model_dir::write(dir.path());
    match content {
        Some(content) => std::fs::write(dir.path().join(file), content).unwrap(),
        None => std::fs::remove_file(dir.path().join(file)).unwrap(),
    }
    Model::load(&options(dir.path()))
}

#[test]
fn a_directory_gives_limits_names_and_tokens() {
    let dir = tempfile::tempdir().unwrap();
    model_dir::write(dir.path());
    let model = Model::load(&options(dir.path())).unwrap();
    assert_eq!(model.names, ["tiny", "other"]);
    assert_eq!((model.vocab, model.max_context), (model_dir::VOCAB, model_dir::CONTEXT));
    assert_eq!((model.eos.as_slice(), model.bos), (&[model_dir::EOS][..], Some(model_dir::BOS)));
    let tokens = model.chat_tokens(&[user(" hello ")], 0).unwrap();
    let text = model.vocabulary.decode(&tokens);
    assert_eq!(text, "user: hello\nassistant: ");
    assert_eq!(tokens[0], model_dir::BOS);
    let limited = ModelOptions { max_context: Some(100), ..options(dir.path()) };
    assert_eq!(Model::load(&limited).unwrap().max_context, 100);
}

#[test]
fn generation_config_names_the_end_tokens() {
    let model = spoiled("generation_config.json", Some(r#"{"eos_token_id":[298, 297]}"#)).unwrap();
    assert_eq!(model.eos, [298, 297]);
}

#[test]
fn a_template_file_comes_before_the_configuration() {
    let model = spoiled("chat_template.jinja", Some("{{ messages[0].content }}!")).unwrap();
    let tokens = model.chat_tokens(&[user("hi")], 0).unwrap();
    assert_eq!(model.vocabulary.decode(&tokens), "hi!");
}

#[test]
fn an_empty_prompt_is_the_first_token_or_refused() {
    let model = spoiled("chat_template.jinja", Some("")).unwrap();
    assert_eq!(model.chat_tokens(&[user("hi")], 0).unwrap(), [model_dir::BOS]);
    let nameless = r#"{"vocab_size":300,"max_position_embeddings":64}"#;
    let dir = tempfile::tempdir().unwrap();
    model_dir::write(dir.path());
    std::fs::write(dir.path().join("config.json"), nameless).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
    let model = Model::load(&options(dir.path())).unwrap();
    assert!(matches!(model.text_tokens("", 0), Err(PromptError::Empty)));
    assert!(matches!(model.chat_tokens(&[user("hi")], 0), Err(PromptError::NoTemplate)));
}

#[test]
fn what_is_wrong_with_a_directory_is_named() {
    type Check = fn(&ModelError) -> bool;
    let cases: [(&str, Option<&str>, Check, &str); 7] = [
        ("config.json", None, |e| matches!(e, ModelError::Read { .. }), "config.json"),
        ("tokenizer.json", None, |e| matches!(e, ModelError::Read { .. }), "tokenizer.json"),
        ("config.json", Some("{"), |e| matches!(e, ModelError::Json { .. }), "config.json"),
        ("tokenizer.json", Some("{}"), |e| matches!(e, ModelError::Tokenizer { .. }), "tokenizer.json"),
        (
            "tokenizer_config.json",
            Some("3"),
            |e| matches!(e, ModelError::Json { .. }),
            "tokenizer_config.json",
        ),
        (
            "chat_template.jinja",
            Some("{% for %}"),
            |e| matches!(e, ModelError::Template { .. }),
            "chat_template",
        ),
        (
            "config.json",
            Some(r#"{"vocab_size":200}"#),
            |e| matches!(e, ModelError::Vocabulary { id: 298, vocab: 200, .. }),
            "do not belong together",
        ),
    ];
    for (file, content, fits, said) in cases {
        match spoiled(file, content) {
            Ok(_) => panic!("{file} {content:?} must be refused"),
            Err(error) => {
                assert!(fits(&error), "{file} {content:?}: {error:?}");
                assert!(error.to_string().contains(said), "{error}");
            }
        }
    }
}
