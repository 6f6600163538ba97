//! Two distributions over the same bins, one laid over the other: as text for a terminal, as SVG for everything else.

use std::fmt::Write;

use offline_store::profile::{Bin, Histogram};

/// Cells of the longest bar.
const BAR: f64 = 48.0;
/// A label is cut after so many characters.
const LABEL_CHARACTERS: usize = 24;

const BOTH: char = '█';
const SERVED: char = '▓';
const TRAINED: char = '░';

/// What the two distributions are called.
#[derive(Debug, Clone)]
pub struct Legend {
    pub reference: String,
    pub share: String,
}

/// Lines of text, a bin each.
pub fn lines(histogram: &Histogram, legend: &Legend) -> Vec<String> {
    let Histogram { reference_rows, rows, bins, .. } = histogram;
    let mut lines = vec![format!(
        "{}   {BOTH} both   {TRAINED} only {} ({reference_rows} rows)   {SERVED} only {} ({rows} rows)",
        title(histogram),
        legend.reference,
        legend.share,
    )];
    let highest = highest(bins);
    let width = bins.iter().map(|bin| label(&bin.label).chars().count()).max().unwrap_or(0);
    for bin in bins {
        let cells = |share: f64| (share / highest * BAR).round() as usize;
        let (reference, share) = (cells(bin.reference), cells(bin.share));
        let (both, more) = (reference.min(share), reference.abs_diff(share));
        let rest = if reference > share { TRAINED } else { SERVED };
        let bar: String = std::iter::repeat_n(BOTH, both).chain(std::iter::repeat_n(rest, more)).collect::<String>();
        lines.push(format!(
            "  {:>width$} │{bar:<bar_width$} {:>6} -> {:>6}",
            label(&bin.label),
            percent(bin.reference),
            percent(bin.share),
            bar_width = BAR as usize,
        ));
    }
    lines
}

fn title(histogram: &Histogram) -> String {
    match &histogram.part {
        Some(part) => format!("{}, {part}", histogram.feature),
        None => histogram.feature.clone(),
    }
}

fn highest(bins: &[Bin]) -> f64 {
    bins.iter().map(|bin| bin.reference.max(bin.share)).fold(f64::MIN_POSITIVE, f64::max)
}

fn label(text: &str) -> String {
    if text.chars().count() <= LABEL_CHARACTERS {
        return text.to_owned();
    }
    text.chars().take(LABEL_CHARACTERS - 1).chain(['…']).collect()
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 48.0;
const HEIGHT: f64 = 220.0;
/// Of a histogram with its title and its labels.
const WHOLE: f64 = HEIGHT + 130.0;

/// A drawing of all of them, one below the other.
pub fn svg(histograms: &[Histogram], legend: &Legend) -> String {
    let height = WHOLE * histograms.len().max(1) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (index, histogram) in histograms.iter().enumerate() {
        draw(&mut svg, histogram, legend, WHOLE * index as f64);
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw(svg: &mut String, histogram: &Histogram, legend: &Legend, top: f64) {
    // Writing to a text cannot fail.
    let _ = writeln!(
        svg,
        "<text x=\"{MARGIN}\" y=\"{}\" font-size=\"15\" font-weight=\"bold\">{}</text>",
        top + 24.0,
        escaped(&title(histogram))
    );
    for (place, (colour, name, rows)) in
        [("#4477aa", &legend.reference, histogram.reference_rows), ("#ee6677", &legend.share, histogram.rows)]
            .into_iter()
            .enumerate()
    {
        let x = WIDTH / 2.0 + 220.0 * place as f64;
        let y = top + 14.0;
        let name = escaped(&format!("{name} ({rows} rows)"));
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{colour}\" fill-opacity=\"0.55\"/>\
             <text x=\"{}\" y=\"{}\">{name}</text>",
            x + 18.0,
            y + 10.0
        );
    }
    let base = top + 40.0 + HEIGHT;
    let step = (WIDTH - 2.0 * MARGIN) / histogram.bins.len().max(1) as f64;
    let highest = highest(&histogram.bins);
    for (place, bin) in histogram.bins.iter().enumerate() {
        let x = MARGIN + step * place as f64;
        for (colour, share) in [("#4477aa", bin.reference), ("#ee6677", bin.share)] {
            let height = share / highest * HEIGHT;
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{colour}\" fill-opacity=\"0.55\"/>",
                x + 0.05 * step,
                base - height,
                0.9 * step,
            );
        }
        let (middle, under) = (x + step / 2.0, base + 14.0);
        let text = escaped(&label(&bin.label));
        let _ = writeln!(
            svg,
            "<text x=\"{middle:.1}\" y=\"{under:.1}\" font-size=\"10\" text-anchor=\"end\" transform=\"rotate(-40 {middle:.1} {under:.1})\">{text}</text>"
        );
    }
    let _ = writeln!(
        svg,
        "<line x1=\"{MARGIN}\" y1=\"{base}\" x2=\"{}\" y2=\"{base}\" stroke=\"black\"/>\
         <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
        WIDTH - MARGIN,
        MARGIN - 4.0,
        base - HEIGHT + 10.0,
        percent(highest)
    );
}

/// Names and labels are data: they may hold anything.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            other if other.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram() -> Histogram {
        let bin = |label: &str, reference, share| Bin { label: label.into(), reference, share };
        Histogram {
            feature: "weather:temp".into(),
            part: None,
            reference_rows: 100,
            rows: 10,
            bins: vec![bin("under 0", 0.0, 0.1), bin("0 to <10>", 0.8, 0.4), bin("over 10", 0.2, 0.5)],
        }
    }

    fn legend() -> Legend {
        Legend { reference: "spring".into(), share: "july & august".into() }
    }

    #[test]
    fn bars_lie_over_each_other() {
        let lines = lines(&histogram(), &legend());
        assert!(lines[0].contains("weather:temp") && lines[0].contains("july & august (10 rows)"), "{lines:?}");
        let count = |line: &str, cell: char| line.chars().filter(|c| *c == cell).count();
        assert_eq!((count(&lines[1], BOTH), count(&lines[1], SERVED), count(&lines[1], TRAINED)), (0, 6, 0));
        assert_eq!((count(&lines[2], BOTH), count(&lines[2], SERVED), count(&lines[2], TRAINED)), (24, 0, 24));
        assert_eq!((count(&lines[3], BOTH), count(&lines[3], SERVED), count(&lines[3], TRAINED)), (12, 18, 0));
        assert!(lines[2].ends_with("80.0 % -> 40.0 %"), "{}", lines[2]);
    }

    #[test]
    fn a_drawing_says_the_same() {
        let svg = svg(&[histogram(), histogram()], &legend());
        assert!(svg.contains("july &amp; august") && svg.contains("0 to &lt;10&gt;") && !svg.contains("<10>"), "{svg}");
        // Two of each bin, and one of the background, and two of the legend, for each.
        assert_eq!(svg.matches("<rect").count(), 1 + 2 * (2 + 6));
        assert!(svg.trim_end().ends_with("</svg>"));
    }
}
