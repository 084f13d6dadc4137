-- One run's fills.parquet into fill_event. Parameters: $run_no, $session, $path.
--
-- x = visible quantity at decision; y- and y+ = share of x in the book before and after arrival; a = place of the arrival between
-- the two; y = y- + a (y+ - y-). An event says something about arrival only if a book newer than the decision book stood before
-- it, or if it lies between two books that are close enough (g_max = twice the median gap of that book). zone_no(...) is the
-- CASE generated from the zone table.

INSERT INTO fill_event
WITH leg AS (
    SELECT
        order_id, venue, symbol, side, time_ns, arrive_ns, decision_book_ns, before_ns, after_ns, edge_bps,
        size_e8, visible_e8, depth_e8, before_e8, after_e8, filled_e8, first_in_episode, resolved,
        arrive_ns - time_ns AS latency_ns,
        CASE side WHEN 'buy' THEN 1.0::DOUBLE ELSE -1.0::DOUBLE END AS sign,
        (bid_px_e8::DOUBLE + ask_px_e8::DOUBLE) / 2 AS mid,
        CASE side WHEN 'buy' THEN ask_px_e8 ELSE bid_px_e8 END::DOUBLE AS touch,
        bid_px_e8 > 0 AND ask_px_e8 > 0 AND visible_e8 > 0 AND filled_e8 > 0 AS priced,
        visible_quote_e8::DOUBLE * 1e8 / nullif(visible_e8, 0) AS visible_px,
        quote_e8::DOUBLE * 1e8 / nullif(filled_e8, 0) AS fill_px
    FROM read_parquet($path)
),
bracket AS (
    SELECT
        leg.*,
        2 * book.gap_median_ns AS g_max_ns,
        zone_no(leg.venue, side, edge_bps, visible_e8::DOUBLE / nullif(depth_e8, 0), latency_ns) AS zone_no,
        before_e8::DOUBLE / nullif(visible_e8, 0) AS y_before,
        after_e8::DOUBLE / nullif(visible_e8, 0) AS y_after,
        CASE WHEN resolved THEN (arrive_ns - before_ns)::DOUBLE / nullif(after_ns - before_ns, 0) END AS a,
        CASE
            WHEN leg.venue NOT IN ('upbit', 'binance') THEN 'an unknown venue'
            WHEN side NOT IN ('buy', 'sell') THEN 'an unknown side'
            WHEN book.venue IS NULL THEN 'no line for its venue and symbol among the books of run.json'
            WHEN latency_ns < 0 THEN 'an arrival before its decision'
            WHEN decision_book_ns > time_ns THEN 'a decision book from after the decision'
            WHEN size_e8 <= 0 OR visible_e8 < 0 OR visible_e8 > size_e8 OR visible_e8 > depth_e8
                THEN 'a visible quantity outside the order or the book'
            WHEN filled_e8 < 0 OR filled_e8 > size_e8 THEN 'a fill outside the order'
            WHEN NOT resolved THEN NULL
            WHEN before_ns < decision_book_ns OR before_ns > arrive_ns OR after_ns <= arrive_ns
                THEN 'books that do not lie around the arrival'
            WHEN before_e8 < 0 OR before_e8 > visible_e8 OR after_e8 < 0 OR after_e8 > visible_e8
                THEN 'a survival outside 0 and 1'
        END AS defect
    FROM leg LEFT JOIN book ON book.run_no = $run_no AND book.venue = leg.venue AND book.symbol = leg.symbol
),
judged AS (
    SELECT
        *,
        y_before + a * (y_after - y_before) AS y,
        CASE
            WHEN NOT first_in_episode THEN 'repeated'
            WHEN visible_e8 = 0 THEN 'nothing_visible'
            WHEN zone_no IS NULL THEN 'no_zone'
            WHEN resolved AND before_ns > decision_book_ns THEN 'fitted'
            WHEN resolved AND a > 0 AND arrive_ns - before_ns <= g_max_ns AND after_ns - arrive_ns <= g_max_ns THEN 'fitted'
            ELSE 'unresolved'
        END AS verdict
    FROM bracket
)
SELECT
    $run_no, $session, order_id, venue, symbol, side, time_ns, latency_ns, edge_bps, size_e8, visible_e8, zone_no, verdict, defect,
    CASE
        WHEN latency_ns <> 0 THEN NULL
        WHEN NOT resolved OR before_e8 = visible_e8 THEN 'passed'
        ELSE 'failed'
    END,
    round(1e9 * y)::BIGINT,
    round(1e9 * CASE WHEN a IS NOT NULL THEN least(y_before, y_after) END)::BIGINT,
    round(1e9 * CASE WHEN a IS NOT NULL THEN greatest(y_before, y_after) END)::BIGINT,
    round(1e9 * y * visible_e8 / nullif(size_e8, 0))::BIGINT,
    CASE WHEN priced THEN round(1e10 * sign * (touch - mid) / mid)::BIGINT END,
    CASE WHEN priced THEN round(1e10 * sign * (visible_px - touch) / mid)::BIGINT END,
    CASE WHEN priced THEN round(1e10 * sign * (fill_px - visible_px) / mid)::BIGINT END
FROM judged;
