//! Lists in pages: where one ends, and how the next is asked for. It must not know what is listed.

use choir_api::workspaces::Page;
use jiff::Timestamp;
use serde::Deserialize;

/// What a query says of the page it wants.
#[derive(Deserialize)]
pub struct Pages {
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before.
    pub cursor: Option<String>,
}

impl Pages {
    /// What of a whole list is on this page, in the order of the keys, which are each item's own; all in its own order
    /// where no page is asked for. What goes or comes between two pages moves nothing else from one to another.
    pub fn cut<T>(self, mut all: Vec<T>, key: impl Fn(&T) -> String) -> Page<T> {
        if self.limit.is_some() || self.cursor.is_some() {
            all.sort_by_cached_key(&key);
        }
        if let Some(cursor) = self.cursor {
            all.retain(|item| key(item) > cursor);
        }
        let most = self.limit.map_or(usize::MAX, |limit| limit.clamp(1, 200) as usize);
        let more = all.len() > most;
        all.truncate(most);
        Page {
            next_cursor: all.last().filter(|_| more).map(&key),
            items: all,
        }
    }
}

/// A key that puts what is newer first.
pub fn newest_first(created_at: Timestamp, id: impl std::fmt::Display) -> String {
    format!(
        "{:020}-{id}",
        i128::from(i64::MAX) - i128::from(created_at.as_microsecond())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(all: &[u32], limit: Option<u32>, cursor: Option<&str>) -> Page<u32> {
        let cursor = cursor.map(str::to_owned);
        Pages { limit, cursor }.cut(all.to_vec(), u32::to_string)
    }

    #[test]
    fn pages_are_the_list_once_whatever_goes_between_them() {
        let mut all = vec![3, 1, 2, 5, 4];
        assert_eq!(page(&all, None, None).items, all, "nobody asked for an order");
        let (mut seen, mut cursor) = (Vec::new(), None);
        loop {
            let next = page(&all, Some(2), cursor.as_deref());
            assert!(!next.items.is_empty());
            all.retain(|item| !next.items.contains(item));
            seen.extend(next.items);
            cursor = next.next_cursor;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!(seen, [1, 2, 3, 4, 5]);
        assert!(
            page(&[1, 2], Some(2), None).next_cursor.is_none(),
            "it is full, and the last"
        );
        assert_eq!(page(&[1, 2], Some(0), None).items, [1]);
    }

    #[test]
    fn what_is_newer_comes_first() {
        let at = |text: &str| newest_first(text.parse().unwrap(), "p-1");
        assert!(at("2026-11-27T10:00:00.5Z") < at("2026-11-27T10:00:00Z"));
        assert!(at("2026-11-27T10:00:01Z") < at("2026-11-27T10:00:00.5Z"));
        assert!(at("2026-11-27T10:00:00Z") < at("1969-12-31T23:59:59Z"));
    }
}
