package fault_test

import (
	"os"
	"testing"

	"idempotent-orders/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }
