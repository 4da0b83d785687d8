//! Lists in pages: where one ends, and how the next is asked for. It must not know what is listed.

use choir_api::workspaces::Page;
use serde::Deserialize;

use crate::error::{ApiError, ApiResult};

/// What a query says of the page it wants.
#[derive(Deserialize)]
pub struct Pages {
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before.
    pub cursor: Option<String>,
}

impl Pages {
    /// What of a whole list is on this page; all that follows the cursor where no limit is given. A cursor is the `id` of
    /// the last item before it.
    pub fn cut<T>(self, all: Vec<T>, id: impl Fn(&T) -> String) -> ApiResult<Page<T>> {
        let mut items = all;
        if let Some(cursor) = self.cursor {
            let last = items.iter().position(|item| id(item) == cursor);
            items.drain(..=last.ok_or_else(bad_cursor)?);
        }
        let most = self.limit.map_or(usize::MAX, |limit| limit.clamp(1, 200) as usize);
        let more = items.len() > most;
        items.truncate(most);
        Ok(Page {
            next_cursor: items.last().filter(|_| more).map(&id),
            items,
        })
    }
}

pub fn bad_cursor() -> ApiError {
    let message = "The cursor is not one that this list gave, or what it named is gone; begin again without it.";
    ApiError::bad_request("bad_cursor", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(limit: Option<u32>, cursor: Option<&str>) -> ApiResult<Page<u32>> {
        let pages = Pages {
            limit,
            cursor: cursor.map(str::to_owned),
        };
        pages.cut(vec![3, 1, 2], u32::to_string)
    }

    #[test]
    fn pages_are_the_list_in_its_order_once() {
        let (mut seen, mut cursor) = (Vec::new(), None);
        loop {
            let next = page(Some(2), cursor.as_deref()).unwrap();
            assert!(!next.items.is_empty());
            seen.extend(next.items);
            cursor = next.next_cursor;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!(seen, [3, 1, 2]);
        // The last one is full, and says that it is the last.
        assert!(page(Some(3), None).unwrap().next_cursor.is_none());
        assert_eq!(page(None, Some("3")).unwrap().items, [1, 2]);
        assert_eq!(page(Some(0), None).unwrap().items, [3]);
    }

    #[test]
    fn a_cursor_of_what_is_not_there_is_refused() {
        assert!(page(None, Some("4")).is_err());
    }
}
