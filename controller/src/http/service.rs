//! Which service a request is for.
//!
//! All services share one port. A signed request says it itself: the credential's scope ends with
//! the service's name. An unsigned one is told by its shape, only so that it is refused in the right
//! words: a form posted to `/`, or a query with an `Action`, is meant for EC2, all else for S3.

use http::{HeaderMap, Method, Uri};

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Service {
    Ec2,
    Sts,
    S3,
    /// Signed for a service that is not here.
    Unknown(String),
}

impl Service {
    /// Tells from the request's head alone.
    pub fn of(method: &Method, uri: &Uri, headers: &HeaderMap) -> Service {
        let authorization = headers.get(http::header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let query = uri.query().unwrap_or("");
        let credential = match authorization {
            Some(value) => {
                value.split("Credential=").nth(1).and_then(|rest| rest.split([',', ' ']).next()).map(str::to_owned)
            }
            None => query_value(query, "X-Amz-Credential"),
        };
        if let Some(name) = credential.as_deref().and_then(|credential| credential.split('/').nth(3)) {
            return match name {
                "ec2" => Service::Ec2,
                "sts" => Service::Sts,
                "s3" => Service::S3,
                other => Service::Unknown(other.to_owned()),
            };
        }
        let form = headers
            .get(http::header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"application/x-www-form-urlencoded"));
        let posted = method == Method::POST && uri.path() == "/" && (form || query.is_empty());
        if posted || query_value(query, "Action").is_some() { Service::Ec2 } else { Service::S3 }
    }
}

fn query_value(query: &str, name: &str) -> Option<String> {
    crate::auth::sigv4::query_pairs(query).into_iter().find(|(n, _)| n == name).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: Method, uri: &str, headers: &[(&'static str, &str)]) -> Service {
        let headers = headers.iter().map(|(n, v)| (http::HeaderName::from_static(n), v.parse().unwrap())).collect();
        Service::of(&method, &uri.parse().unwrap(), &headers)
    }

    #[test]
    fn the_scope_decides() {
        for (name, service) in
            [("ec2", Service::Ec2), ("sts", Service::Sts), ("s3", Service::S3), ("iam", Service::Unknown("iam".into()))]
        {
            let value =
                format!("AWS4-HMAC-SHA256 Credential=K/20260101/mallee-1/{name}/aws4_request, SignedHeaders=host");
            assert_eq!(of(Method::POST, "/", &[("authorization", &value)]), service);
            for credential in ["X-Amz-Credential", "X-Amz%2DCredential"] {
                let query = format!("/b/k?{credential}=K%2F20260101%2Fmallee-1%2F{name}%2Faws4_request");
                assert_eq!(of(Method::GET, &query, &[]), service);
            }
        }
    }

    #[test]
    fn an_unsigned_request_is_told_by_its_shape() {
        let form = ("content-type", "application/x-www-form-urlencoded; charset=utf-8");
        assert_eq!(of(Method::POST, "/", &[form]), Service::Ec2);
        assert_eq!(of(Method::GET, "/?Action=DescribeInstances", &[]), Service::Ec2);
        assert_eq!(of(Method::GET, "/", &[]), Service::S3);
        assert_eq!(of(Method::POST, "/bucket", &[("content-type", "multipart/form-data; boundary=x")]), Service::S3);
    }
}
