//go:build !faults

package fault

import "idempotent-orders/gen/db"

// Reached does nothing.
func (Point) Reached() {}

// Removed is false: nothing is removed.
func (Removal) Removed() bool { return false }

// SQL returns what it is given.
func SQL(d db.DBTX) db.DBTX { return d }
