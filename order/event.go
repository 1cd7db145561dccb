package order

import (
	"encoding/json"
	"fmt"

	"github.com/google/uuid"

	"idempotent-orders/gen/api"
)

// CreatedEvent returns the event that announces a placed order. The id makes it unique for ever.
func CreatedEvent(id uuid.UUID, o Order, traceparent string) api.OrderCreatedV1 {
	event := api.OrderCreatedV1{
		Specversion:     api.OrderCreatedV1SpecversionV1,
		Id:              id,
		Source:          api.OrderCreatedV1SourceOrders,
		Type:            api.OrderCreatedV1TypeOrderCreated,
		Subject:         o.ID,
		Time:            o.CreatedAt,
		Datacontenttype: api.OrderCreatedV1DatacontenttypeJSON,
		Data:            api.OrderCreatedV1Data{OrderId: o.ID, UserId: o.UserID, Amount: o.Amount, CreatedAt: o.CreatedAt},
	}
	if traceparent != "" {
		event.Traceparent = &traceparent
	}
	return event
}

// payload is the event's data as it is stored and published.
func payload(event api.OrderCreatedV1) ([]byte, error) {
	data, err := json.Marshal(event.Data)
	if err != nil {
		return nil, fmt.Errorf("encode the event of order %s: %w", event.Subject, err)
	}
	return data, nil
}
