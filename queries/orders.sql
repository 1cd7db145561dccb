-- name: InsertOrders :exec
INSERT INTO orders (id, caller, user_id, amount)
SELECT unnest(@ids::uuid[]), unnest(@callers::text[]), unnest(@user_ids::text[]), unnest(@amounts::bigint[]);

-- name: GetOrder :one
SELECT id, caller, user_id, amount, status, created_at
FROM orders
WHERE id = @id AND caller = @caller;
