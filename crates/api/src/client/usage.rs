//! Calls about what was used of the model providers.

use choir_core::Name;
use jiff::civil::Date;

use super::{Client, ClientError};
use crate::usage::Usage;

impl Client {
    /// One's own use, from this day on; of the last 30 days where none is given.
    ///
    /// # Errors
    /// Any.
    pub async fn usage(&self, since: Option<Date>) -> Result<Usage, ClientError> {
        self.get(&path("/me/usage?", None, since)).await
    }

    /// Everybody's, or one user's.
    ///
    /// # Errors
    /// Any; 403 for one who is not an admin.
    pub async fn everybodys_usage(&self, user: Option<&Name>, since: Option<Date>) -> Result<Usage, ClientError> {
        self.get(&path("/admin/usage?", user, since)).await
    }
}

fn path(path: &str, user: Option<&Name>, since: Option<Date>) -> String {
    let mut query = url::form_urlencoded::Serializer::for_suffix(path.to_owned(), path.len());
    if let Some(user) = user {
        query.append_pair("user", user.as_str());
    }
    if let Some(since) = since {
        query.append_pair("since", &since.to_string());
    }
    query.finish()
}
