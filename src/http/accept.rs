use crate::metrics::MetricsFormat;
use http::{HeaderMap, header::ACCEPT};
use std::cmp::Ordering;

/// The format in which to answer: `OpenMetrics` if the request asks for it by name, and no less than for the other.
///
/// RFC 9110 §12.5.1: a media range with its quality; the most specific range that matches a type decides.
pub(super) fn metrics_format(headers: &HeaderMap) -> MetricsFormat {
    let lines = headers
        .get_all(ACCEPT)
        .into_iter()
        .filter_map(|line| line.to_str().ok());
    let mut open_metrics = 0.0_f64;
    // For the older format: how specific the best range was, and its quality.
    let mut text = (0_u8, 0.0_f64);
    for range in lines.flat_map(|line| line.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default().to_ascii_lowercase();
        let parameters = parts.filter_map(|part| part.split_once('='));
        let (mut quality, mut version) = (1.0_f64, None);
        for (name, value) in parameters {
            match name.trim().to_ascii_lowercase().as_str() {
                "q" => quality = value.trim().parse().unwrap_or(0.0),
                "version" => version = Some(value.trim().trim_matches('"')),
                _ => {}
            }
        }
        if !(0.0..=1.0).contains(&quality) {
            quality = 0.0;
        }
        match media_type.as_str() {
            "application/openmetrics-text" if matches!(version, None | Some("1.0.0" | "0.0.1")) => {
                open_metrics = open_metrics.max(quality);
            }
            "text/plain" if matches!(version, None | Some("0.0.4")) => text = best(text, (3, quality)),
            "text/*" => text = best(text, (2, quality)),
            "*/*" => text = best(text, (1, quality)),
            _ => {}
        }
    }
    if open_metrics > 0.0 && open_metrics >= text.1 {
        MetricsFormat::OpenMetrics
    } else {
        MetricsFormat::Prometheus
    }
}

/// The more specific range; of two alike, the one with the higher quality.
fn best(one: (u8, f64), other: (u8, f64)) -> (u8, f64) {
    if other.partial_cmp(&one) == Some(Ordering::Greater) {
        other
    } else {
        one
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn the_format_follows_the_accept_header() {
        let prometheus_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
            application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,\
            text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for (accept, format) in [
            (prometheus_3, MetricsFormat::OpenMetrics),
            ("", MetricsFormat::Prometheus),
            ("*/*", MetricsFormat::Prometheus),
            ("text/plain", MetricsFormat::Prometheus),
            ("application/openmetrics-text", MetricsFormat::OpenMetrics),
            (
                "Application/OpenMetrics-Text; Version=\"1.0.0\"",
                MetricsFormat::OpenMetrics,
            ),
            ("application/openmetrics-text; version=2.0.0", MetricsFormat::Prometheus),
            ("application/openmetrics-text;q=0", MetricsFormat::Prometheus),
            ("application/openmetrics-text;q=nan", MetricsFormat::Prometheus),
            (
                "application/openmetrics-text;q=0.5, text/plain;q=0.9",
                MetricsFormat::Prometheus,
            ),
            (
                "application/openmetrics-text;q=0.5, text/plain;q=0.2, */*",
                MetricsFormat::OpenMetrics,
            ),
            ("text/html,*/*;q=0.8", MetricsFormat::Prometheus),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(accept).unwrap());
            assert_eq!(metrics_format(&headers), format, "Accept: {accept}");
        }
    }
}
