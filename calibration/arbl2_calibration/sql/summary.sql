-- What was read, in one row: the guards look at it before anything is estimated.

SELECT
    count(*) FILTER (WHERE verdict = 'fitted')                           AS fitted,
    count(DISTINCT visible_e8) FILTER (WHERE verdict = 'fitted')         AS sizes,
    count(*) FILTER (WHERE verdict = 'fitted' AND edge_bps <> 0)         AS edges,
    count(*) FILTER (WHERE verdict = 'repeated')                         AS repeated,
    count(*) FILTER (WHERE verdict = 'nothing_visible')                  AS nothing_visible,
    count(*) FILTER (WHERE verdict = 'no_zone')                          AS no_zone,
    count(*) FILTER (WHERE verdict = 'unresolved')                       AS unresolved,
    coalesce(max(latency_ns) FILTER (WHERE verdict = 'fitted'), 0)       AS latency_max_ns
FROM fill_event;
