//! What a run prints: a table to read, or one JSON object.

use std::io::{self, Write as _};

use serde_json::{Map, Value, json};

use super::{book::Latency, tally::Tally};

/// The figures of a run, in the order in which they are shown.
#[derive(Debug, Default)]
pub(super) struct Report {
    rows: Vec<(String, String)>,
    json: Map<String, Value>,
}

impl Report {
    /// A figure: its key in JSON, its words in the table, and how it is written there.
    pub(super) fn put(&mut self, key: &str, words: &str, value: impl Into<Value>, shown: String) {
        self.rows.push((words.to_owned(), shown));
        self.json.insert(key.to_owned(), value.into());
    }

    pub(super) fn count(&mut self, key: &str, words: &str, count: u64) {
        self.put(key, words, count, grouped(count));
    }

    /// A figure with a few digits behind the point.
    pub(super) fn number(&mut self, key: &str, words: &str, number: f64, digits: usize) {
        let shown = format!("{number:.digits$}");
        let value = shown.parse::<f64>().unwrap_or_default();
        self.put(key, words, value, shown);
    }

    /// A rate, in whole numbers.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rates are neither negative nor near 2^64"
    )]
    pub(super) fn rate(&mut self, key: &str, words: &str, per_second: f64) {
        self.count(key, words, per_second.max(0.0).round() as u64);
    }

    pub(super) fn bytes(&mut self, key: &str, words: &str, bytes: Option<u64>) {
        if let Some(bytes) = bytes {
            self.put(key, words, bytes, format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)));
        }
    }

    pub(super) fn latency(&mut self, key: &str, words: &str, latency: &Latency) {
        let (p50, p99, p999, max) = (
            latency.value_at_quantile(0.5),
            latency.value_at_quantile(0.99),
            latency.value_at_quantile(0.999),
            latency.max(),
        );
        let shown = if latency.is_empty() {
            "none taken".to_owned()
        } else {
            let ms = |us: u64| format!("{:.2}", us as f64 / 1000.0);
            format!("p50 {}, p99 {}, p99.9 {}, max {} ms", ms(p50), ms(p99), ms(p999), ms(max))
        };
        let value = json!({"p50": p50, "p99": p99, "p999": p999, "max": max, "count": latency.len()});
        self.put(key, words, value, shown);
    }

    /// Errors by kind, and what slow connections met.
    pub(super) fn errors(&mut self, tally: &Tally) {
        for (reason, count) in &tally.slow_closed {
            self.rows.push((format!("slow or stuck, closed: {reason}"), grouped(*count)));
        }
        self.json.insert("slow_closed".to_owned(), json!(tally.slow_closed));
        for (kind, count, example) in tally.errors.iter() {
            self.rows.push((format!("ERROR {kind}"), format!("{} (first: {example})", grouped(count))));
        }
        let errors: Map<String, Value> =
            tally.errors.iter().map(|(kind, count, _)| (kind.to_owned(), count.into())).collect();
        if errors.is_empty() {
            self.rows.push(("errors".to_owned(), "none".to_owned()));
        }
        self.json.insert("errors".to_owned(), errors.into());
    }

    pub(super) fn print(&self, as_json: bool) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if as_json {
            return writeln!(out, "{}", Value::Object(self.json.clone()));
        }
        let width = self.rows.iter().map(|(words, _)| words.chars().count()).max().unwrap_or_default();
        for (words, shown) in &self.rows {
            writeln!(out, "{words:<width$}  {shown}")?;
        }
        Ok(())
    }
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut shown = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_apart() {
        for (number, shown) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), shown);
        }
    }
}
