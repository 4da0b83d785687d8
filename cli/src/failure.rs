//! How a verb ends when it does not end well, and the exit code that says so. It must not know any verb.

use std::io;

use choir_api::client::ClientError;

/// Why a verb did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// It was asked wrongly: exit code 2.
    Usage(String),
    /// It did not work: exit code 1.
    Failed(String),
    /// Everything was said already; this is the exit code.
    Exit(i32),
}

impl Failure {
    /// Says it in one sentence on the standard error and returns the exit code.
    pub fn report(self) -> i32 {
        match self {
            Self::Usage(text) => {
                eprintln!("choir: {}", crate::output::plain(&text));
                2
            }
            Self::Failed(text) => {
                eprintln!("choir: {}", crate::output::plain(&text));
                1
            }
            Self::Exit(code) => code,
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Url(_) => Self::Usage(error.to_string()),
            _ if error.status() == Some(401) => {
                Self::Failed("you are not logged in here, or no longer; run `choir login`".to_owned())
            }
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // Whoever read our output has had enough of it: `choir logs live | head`.
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::Exit(0)
        } else {
            Self::Failed(format!("input or output failed: {error}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use choir_api::error::ErrorDetail;

    fn refused(status: u16) -> ClientError {
        let detail = ErrorDetail {
            code: "x".into(),
            message: "do this".into(),
            request_id: String::new(),
            more: Default::default(),
        };
        ClientError::Refused {
            status,
            detail: Box::new(detail),
        }
    }

    #[test]
    fn each_kind_of_failure_has_its_exit_code() {
        assert_eq!(Failure::from(ClientError::Url("x".into())).report(), 2);
        assert_eq!(Failure::from(refused(409)).report(), 1);
        assert_eq!(Failure::Exit(42).report(), 42);
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).report(), 0);
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::NotFound)).report(), 1);
    }

    #[test]
    fn who_is_not_logged_in_is_told_how() {
        let Failure::Failed(text) = Failure::from(refused(401)) else {
            panic!("not a failure")
        };
        assert!(text.contains("choir login"));
    }
}
