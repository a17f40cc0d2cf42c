use super::*;

#[test]
fn the_table_is_in_the_order_of_the_routes() {
    for (at, route) in Route::all().enumerate() {
        assert_eq!(route as usize, at, "{route:?}");
    }
    assert_eq!(Route::Other as usize + 1, TABLE.len());
}

#[test]
fn every_path_leads_to_its_own_route() {
    for line in &TABLE {
        for path in line.paths {
            assert_eq!(Route::of_path(path), line.route, "{path}");
        }
    }
    for (path, route) in [
        ("/v1/models/org/tiny", Route::Model),
        ("/v1/models/", Route::Other),
        ("/v1/responses/resp_1", Route::StoredResponse),
        ("/v1/responses/resp_1/input_items", Route::StoredResponse),
        ("/v1/responses/", Route::Other),
        ("/v1/messages/batches", Route::Other),
        ("/V1/models", Route::Other),
        ("", Route::Other),
    ] {
        assert_eq!(Route::of_path(path), route, "{path}");
    }
}

#[test]
fn errors_have_the_shape_of_the_api_at_the_path() {
    for path in ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches/1"] {
        assert_eq!(Dialect::of_path(path), Dialect::Anthropic, "{path}");
    }
    for path in ["/v1/messagesx", "/messages", "/v1/chat/completions", "/"] {
        assert_eq!(Dialect::of_path(path), Dialect::OpenAi, "{path}");
    }
}
