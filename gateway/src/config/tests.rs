use super::*;

#[tokio::test]
async fn others_are_not_let_in_unasked() {
    let error = listen(GRPC, "0.0.0.0:0", false).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "`serve.grpc` is 0.0.0.0:0, which others can reach, and nothing here asks who they are; keep to 127.0.0.1, or \
         write `listen_beyond_loopback_without_authentication: true` under `serve:` in coeval.yaml"
    );
    assert!(listen(GRPC, "0.0.0.0:0", true).await.is_ok());
    assert!(listen(GRPC, "127.0.0.1:0", false).await.unwrap().address.port() > 0);
}

#[tokio::test]
async fn a_port_in_use_is_named_with_its_setting() {
    let first = listen(HTTP, "127.0.0.1:0", false).await.unwrap();
    let error = listen(HTTP, &first.address.to_string(), false).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{} is in use by another process; stop it, or change `serve.http` in coeval.yaml (port 0 takes any free one)",
            first.address
        )
    );
}

#[tokio::test]
async fn an_address_that_is_none_is_shown() {
    let error = listen(GRPC, "nonsense", false).await.unwrap_err();
    assert!(error.to_string().starts_with("`serve.grpc` is `nonsense`, which is not an address: "), "{error}");
}

#[test]
fn places_are_below_the_project() {
    assert_eq!(place(Path::new("/p"), "./.coeval"), "/p/./.coeval");
    assert_eq!(place(Path::new("/p"), "/store"), "/store");
    assert_eq!(place(Path::new("/p"), "s3://b/x"), "s3://b/x");
    assert_eq!(local_folder(Path::new("/p"), ".coeval", "x"), Path::new("/p/.coeval/local/x"));
    assert_eq!(local_folder(Path::new("/p"), "file:///s", "x"), Path::new("/s/local/x"));
    assert_eq!(local_folder(Path::new("/p"), "s3://b/c", "x"), Path::new("/p/.coeval/local/x"));
}
