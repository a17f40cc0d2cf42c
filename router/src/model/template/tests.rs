use super::*;

fn message(role: &'static str, content: &str) -> Message {
    Message { role, content: content.to_owned(), name: None }
}

fn render(template: &str, messages: &[Message]) -> Result<String, TemplateError> {
    let special =
        SpecialTokens { bos: Some("<s>".to_owned()), eos: Some("</s>".to_owned()), ..Default::default() };
    ChatTemplate::compile(Some(template.to_owned()), special).unwrap().render(messages)
}

/// The shape of Qwen's and SmolLM's templates.
const CHATML: &str = "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n{%- else %}\n    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n{%- endif %}\n{%- for message in messages %}\n    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";

/// The shape of Llama 2's and Mistral's: namespaces, slices, strip, raise_exception.
const INST: &str = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>' + system_message + '<</SYS>>' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

#[test]
fn templates_of_well_known_models_render() {
    let chat = [message("user", "hi"), message("assistant", "yo"), message("user", "ok ")];
    assert_eq!(
        render(CHATML, &chat).unwrap(),
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nok <|im_end|>\n<|im_start|>assistant\n"
    );
    let chat =
        [message("system", "S"), message("user", "hi"), message("assistant", " yo "), message("user", "ok ")];
    assert_eq!(
        render(INST, &chat).unwrap(),
        "<s>[INST] <<SYS>>S<</SYS>>hi [/INST] yo </s><s>[INST] ok [/INST]"
    );
}

#[test]
fn what_a_template_raises_is_for_the_client() {
    let twice = [message("user", "a"), message("user", "b")];
    match render(INST, &twice) {
        Err(TemplateError::Refused(why)) => assert_eq!(why, "roles must alternate"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(render("{{ messages[0].content.nothing() }}", &twice), Err(TemplateError::Broken(_))));
}

#[test]
fn json_is_written_as_python_does() {
    let chat = [message("user", "a<b>'é")];
    assert_eq!(
        render("{{ messages | tojson }}", &chat).unwrap(),
        r#"[{"role": "user", "content": "a<b>'é"}]"#
    );
    assert_eq!(render("{{ [1, 2] | tojson(indent=2) }}", &chat).unwrap(), "[\n  1,\n  2\n]");
}

#[test]
fn blocks_are_trimmed_and_loops_controlled() {
    let chat = [message("user", "a"), message("user", "b")];
    let template = "{% for m in messages %}\n  {% if m.content == 'b' %}\n    {% break %}\n  {% endif %}\n{{ m.content }};\n{% endfor %}\nend";
    assert_eq!(render(template, &chat).unwrap(), "a;\nend");
}

#[test]
fn the_date_is_todays() {
    let date = render("{{ strftime_now('%Y-%m-%d') }}", &[]).unwrap();
    assert!(date.len() == 10 && date.starts_with("20"), "{date}");
}

#[test]
fn several_templates_and_special_tokens_are_read() {
    let json = r#"{ "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
        "bos_token": {"content": "<b>", "lstrip": false}, "eos_token": null, "unknown": [1] }"#;
    let config: TokenizerConfig = serde_json::from_str(json).unwrap();
    assert_eq!(config.chat_template.and_then(|source| source.0).as_deref(), Some("D"));
    assert_eq!(config.bos_token.and_then(|name| name.0).as_deref(), Some("<b>"));
    assert!(config.eos_token.is_none());
}

#[test]
fn a_sum_with_what_is_no_text_is_still_refused() {
    let chat = [message("user", " a ")];
    for template in
        ["{{ 'a' + 1 }}", "{{ 'a' + messages[0].nothing }}", "{{ 'a' + none + 'b' }}", "{{ messages + 'a' }}"]
    {
        assert!(matches!(render(template, &chat), Err(TemplateError::Broken(_))), "{template}");
    }
    let template = "{%- for m in messages -%}\n{{- bos_token + m.role + '>' + m['content'] | trim + eos_token -}}\n{% endfor %} {{ [1] + [2] }}";
    assert_eq!(render(template, &chat).unwrap(), "<s>user>a</s> [1, 2]");
}
