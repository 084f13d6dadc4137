-- The one scan: everything later is computed from these sums. Parameter: $block_ns.

CREATE OR REPLACE TABLE block_sum AS
SELECT
    zone_no,
    session,
    time_ns // $block_ns                                     AS block,
    count(*) FILTER (WHERE verdict = 'unresolved')           AS unresolved,
    count(*) FILTER (WHERE fitted)                           AS n,
    coalesce(sum(y_e9) FILTER (WHERE fitted), 0)::BIGINT     AS y_e9,
    coalesce(sum(round(y_e9 * (y_e9 / 1e9))::BIGINT) FILTER (WHERE fitted), 0)::BIGINT AS y2_e9,
    coalesce(sum(y_lo_e9) FILTER (WHERE fitted), 0)::BIGINT  AS y_lo_e9,
    coalesce(sum(y_hi_e9) FILTER (WHERE fitted), 0)::BIGINT  AS y_hi_e9,
    count(*) FILTER (WHERE fitted AND y_e9 = 0)              AS y_none,
    count(*) FILTER (WHERE fitted AND y_e9 = 1000000000)     AS y_all,
    coalesce(sum(fill_e9) FILTER (WHERE fitted), 0)::BIGINT  AS fill_e9,
    count(drift_e6) FILTER (WHERE fitted)                    AS priced,
    coalesce(sum(half_spread_e6) FILTER (WHERE fitted), 0)::BIGINT AS half_spread_e6,
    coalesce(sum(walk_e6) FILTER (WHERE fitted), 0)::BIGINT  AS walk_e6,
    coalesce(sum(drift_e6) FILTER (WHERE fitted), 0)::BIGINT AS drift_e6
FROM (SELECT *, verdict = 'fitted' AS fitted FROM fill_event WHERE verdict IN ('fitted', 'unresolved'))
GROUP BY ALL
ORDER BY zone_no, session, block;
